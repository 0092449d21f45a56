# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Padding, cyclic shift and window partition as one gather, and back.

A *slot* is a place in the sequence of windows; a *row token* is a token in the
feature map, counted row by row. All is arithmetic on height and width. They are
numbers, or tensors while a graph for all sizes is traced.
"""
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

Window = Tuple[int, int]

MASKED = -100.
"""What Swin adds to the logits of two tokens from different regions."""


class Grid(NamedTuple):
    """A table over a feature map, as one factor or term for rows and columns.

    The table has tens of thousands of numbers, the two together a few hundred.
    Files hold the two, and engines compute the table when they load the graph.

    Args:
        rows (Tensor): Shaped to broadcast with ``cols``.
        cols (Tensor): Shaped to broadcast with ``rows``.
    """
    rows: Tensor
    cols: Tensor

    def sum(self) -> Tensor:
        """Add rows and columns: shape (places, )."""
        return (self.rows + self.cols).reshape(-1)

    def product(self) -> Tensor:
        """Multiply rows and columns: shape (places, 1)."""
        return (self.rows * self.cols).reshape(-1, 1)


class WindowOrder(NamedTuple):
    """Where the tokens of a feature map stand in its windows.

    Args:
        token_of_slot (Grid): Row token of each of num_windows * N slots, as a
            sum; any token for padding.
        valid (Grid): 1 for slots with a token and 0 for padding, as a product
            of floats.
        slot_of_token (Grid): Slot of each of H * W row tokens, as a sum.
        kind (Grid): Kind of each window, an index into :func:`shift_masks`,
            as a sum.
    """
    token_of_slot: Grid
    valid: Grid
    slot_of_token: Grid
    kind: Grid


class MergeOrder(NamedTuple):
    """Which row tokens patch merging concatenates.

    Args:
        token (Grid): Row token of each of the 4 places in each merged token,
            as a sum; any token for padding.
        valid (Grid): 1 for tokens and 0 for padding, as a product of floats.
    """
    token: Grid
    valid: Grid


def padded(length: Any, window: int) -> Any:
    """Round a length up to a multiple of the window."""
    return (length + (window - 1)) // window * window


def _axis(length: Any, window: int, shift: int, roll_first: bool) \
        -> Tuple[Tensor, Tensor, Tensor]:
    """Along one axis, find the token of each padded position, whether there is
    one, and the position of each token."""
    total = padded(length, window)
    cycle = length if roll_first else total
    position = torch.arange(total)
    token = (position + shift) % cycle
    if roll_first:  # padding stands behind the rolled map
        valid = position < length
    else:  # padding is rolled too
        valid = token < length
    back = (torch.arange(length) + shift * cycle - shift) % cycle  # never negative before %
    return token * valid, valid, back


def window_order(height: Any, width: Any, window: Window, shift: Window,
                 roll_first: bool) -> WindowOrder:
    """Compute where tokens are in the windows.

    Args:
        height (int or Tensor): Height of the feature map.
        width (int or Tensor): Width of the feature map.
        window (tuple[int, int]): Height and width of a window.
        shift (tuple[int, int]): Cyclic shift towards the top left.
        roll_first (bool): Whether the map is rolled before it is padded (timm),
            or after (mmdet, mmseg).

    Returns:
        WindowOrder: The tables.
    """
    (wh, ww), area = window, window[0] * window[1]
    row, row_valid, row_back = _axis(height, wh, shift[0], roll_first)
    col, col_valid, col_back = _axis(width, ww, shift[1], roll_first)
    rows, cols = padded(height, wh) // wh, padded(width, ww) // ww

    def of_slots(of_rows: Tensor, of_cols: Tensor) -> Grid:
        return Grid(of_rows.reshape(rows, 1, wh, 1), of_cols.reshape(1, cols, 1, ww))

    slot_of_row = row_back // wh * cols * area + row_back % wh * ww
    slot_of_col = col_back // ww * area + col_back % ww
    last_row = (torch.arange(rows) == rows - 1).long()
    last_col = (torch.arange(cols) == cols - 1).long()
    return WindowOrder(of_slots(row * width, col), of_slots(row_valid.float(), col_valid.float()),
                       Grid(slot_of_row.unsqueeze(1), slot_of_col),
                       Grid(last_row.unsqueeze(1) * 2, last_col))


def shift_masks(window: Window, shift: Window) -> Optional[Tensor]:
    """Compute the attention masks of shifted windows.

    A feature map of any size has four kinds of windows: inside, in the last
    column, in the last row, and in both.

    Args:
        window (tuple[int, int]): Height and width of a window.
        shift (tuple[int, int]): Cyclic shift.

    Returns:
        Tensor, optional: Shape (4, N, N), 0 or -100; None without a shift.
    """
    if not any(shift):
        return None
    masks = []
    for last_row in (False, True):
        for last_col in (False, True):
            row = (torch.arange(window[0]) >= window[0] - shift[0]).long() * last_row
            col = (torch.arange(window[1]) >= window[1] - shift[1]).long() * last_col
            region = (row.unsqueeze(1) * 2 + col).reshape(-1)
            apart = region.unsqueeze(0) != region.unsqueeze(1)
            masks.append(torch.where(apart, MASKED, 0.))
    return torch.stack(masks)


def merge_order(height: Any, width: Any, neighbours: Tuple[Window, ...]) -> MergeOrder:
    """Compute which tokens patch merging concatenates.

    Args:
        height (int or Tensor): Height of the feature map; odd ones are padded.
        width (int or Tensor): Width of the feature map.
        neighbours (tuple): Offsets (down, right) of the four patches in the order
            of the channels.

    Returns:
        MergeOrder: The tables.
    """
    top = torch.arange(padded(height, 2) // 2) * 2
    left = torch.arange(padded(width, 2) // 2) * 2
    row = top.reshape(-1, 1, 1) + torch.tensor([n[0] for n in neighbours])
    col = left.reshape(1, -1, 1) + torch.tensor([n[1] for n in neighbours])
    row_valid, col_valid = row < height, col < width
    return MergeOrder(Grid(row * row_valid * width, col * col_valid),
                      Grid(row_valid.float(), col_valid.float()))

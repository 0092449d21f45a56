# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Padding, cyclic shift and window partition as one gather, and back.

A *slot* is a place in the sequence of windows, a *row token* one in the
row-by-row feature map. Everything here is arithmetic on height and width, which
are numbers, or tensors while a graph of variable size is traced.
"""
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

Window = Tuple[int, int]

MASKED = -100.
"""What Swin adds to the logits of tokens that are no neighbours."""


class WindowOrder(NamedTuple):
    """Where the tokens of a feature map stand in its windows.

    Args:
        token_of_slot (Tensor): Row token of each slot, shape
            (num_windows * N, ); 0 for padding.
        valid (Tensor): 1 for slots of tokens and 0 for padding, float of shape
            (num_windows * N, 1).
        slot_of_token (Tensor): Slot of each row token, shape (H * W, ).
        kind (Tensor): Kind of each window, an index into
            :func:`shift_masks`, shape (num_windows, ).
    """
    token_of_slot: Tensor
    valid: Tensor
    slot_of_token: Tensor
    kind: Tensor


def padded(length: Any, window: int) -> Any:
    """The next multiple of the window."""
    return (length + (window - 1)) // window * window


def _axis(length: Any, window: int, shift: int, roll_first: bool) \
        -> Tuple[Tensor, Tensor, Tensor]:
    """Along one axis: token of each padded position, whether it is one, and
    position of each token."""
    total = padded(length, window)
    cycle = length if roll_first else total
    position = torch.arange(total)
    token = (position + shift) % cycle
    if roll_first:  # padding stands behind the rolled map
        valid = position < length
    else:  # and else it is rolled with the rest
        valid = token < length
    back = (torch.arange(length) + shift * cycle - shift) % cycle  # never negative before %
    return token * valid, valid, back


def window_order(height: Any, width: Any, window: Window, shift: Window,
                 roll_first: bool) -> WindowOrder:
    """Compute where tokens stand.

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
    token = row.reshape(rows, 1, wh, 1) * width + col.reshape(1, cols, 1, ww)
    valid = row_valid.reshape(rows, 1, wh, 1) & col_valid.reshape(1, cols, 1, ww)
    slot = ((row_back // wh).unsqueeze(1) * cols + (col_back // ww)) * area \
        + (row_back % wh).unsqueeze(1) * ww + col_back % ww
    last_row = (torch.arange(rows) == rows - 1).long()
    last_col = (torch.arange(cols) == cols - 1).long()
    kind = last_row.unsqueeze(1) * 2 + last_col
    return WindowOrder((token * valid).reshape(-1), valid.float().reshape(-1, 1),
                       slot.reshape(-1), kind.reshape(-1))


def shift_masks(window: Window, shift: Window) -> Optional[Tensor]:
    """The attention masks of shifted windows.

    There are four kinds of windows, whatever the size of the feature map:
    inside, in the last column, in the last row, and in both.

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


def merge_order(height: Any, width: Any, neighbours: Tuple[Window, ...]) -> Tuple[Tensor, Tensor]:
    """Row tokens that patch merging puts side by side.

    Args:
        height (int or Tensor): Height of the feature map; odd ones are padded.
        width (int or Tensor): Width of the feature map.
        neighbours (tuple): Offsets (down, right) in the order of the channels.

    Returns:
        tuple[Tensor, Tensor]: Token of each place, shape (merged tokens, 4),
        0 for padding, and 1 or 0 for padding, float of the same shape.
    """
    top = torch.arange(padded(height, 2) // 2) * 2
    left = torch.arange(padded(width, 2) // 2) * 2
    down = torch.tensor([n[0] for n in neighbours])
    right = torch.tensor([n[1] for n in neighbours])
    row = top.reshape(-1, 1, 1) + down
    col = left.reshape(1, -1, 1) + right
    valid = (row < height) & (col < width)
    token = (row * width + col) * valid
    return token.reshape(-1, 4), valid.float().reshape(-1, 4)

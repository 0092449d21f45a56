# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Gathers against pad, roll and partition as the hosts do them."""
import pytest
import torch
import torch.nn.functional as F

from psaq_mm.deploy.window_order import MASKED, merge_order, shift_masks, window_order

CASES = [(14, 21, (7, 7), (0, 0)), (14, 21, (7, 7), (3, 3)), (15, 10, (7, 7), (3, 3)),
         (5, 6, (7, 7), (3, 3)), (8, 12, (4, 6), (2, 0)), (1, 1, (7, 7), (3, 3))]


def partition(x, window):
    """Windows of a map (H, W), shape (num_windows, N)."""
    height, width = x.shape
    x = x.view(height // window[0], window[0], width // window[1], window[1])
    return x.permute(0, 2, 1, 3).reshape(-1, window[0] * window[1])


def host_windows(x, window, shift, roll_first):
    pad = (0, -x.shape[1] % window[1], 0, -x.shape[0] % window[0])
    back = (-shift[0], -shift[1])
    if roll_first:
        x = F.pad(torch.roll(x, back, (0, 1)), pad)
    else:
        x = torch.roll(F.pad(x, pad), back, (0, 1))
    return partition(x, window)


@pytest.mark.parametrize('roll_first', [False, True])
@pytest.mark.parametrize('height, width, window, shift', CASES)
def test_windows(height, width, window, shift, roll_first):
    x = torch.arange(1., height * width + 1).view(height, width)
    order = window_order(height, width, window, shift, roll_first)
    slots = x.flatten()[order.token_of_slot.sum()] * order.valid.product().squeeze(1)
    expected = host_windows(x, window, shift, roll_first)
    assert torch.equal(slots.view_as(expected), expected)
    assert torch.equal(slots[order.slot_of_token.sum()], x.flatten())


@pytest.mark.parametrize('height, width, window, shift', CASES)
def test_masks(height, width, window, shift):
    """As mmdet computes them, from a map of nine regions."""
    order = window_order(height, width, window, shift, False)
    masks = shift_masks(window, shift)
    if not any(shift):
        assert masks is None
        return
    regions = torch.zeros(-(-height // window[0]) * window[0], -(-width // window[1]) * window[1])
    count = 0
    for rows in (slice(0, -window[0]), slice(-window[0], -shift[0] or None),
                 slice(-shift[0], None) if shift[0] else slice(0, 0)):
        for cols in (slice(0, -window[1]), slice(-window[1], -shift[1] or None),
                     slice(-shift[1], None) if shift[1] else slice(0, 0)):
            regions[rows, cols] = count
            count += 1
    windows = partition(regions, window)
    expected = torch.where(windows.unsqueeze(1) != windows.unsqueeze(2), MASKED, 0.)
    assert torch.equal(masks[order.kind.sum()], expected)


@pytest.mark.parametrize('height, width', [(4, 6), (5, 6), (3, 3), (1, 1)])
def test_merge(height, width):
    """nn.Unfold puts the same patches side by side."""
    x = torch.randn(3, height, width)
    order = merge_order(height, width, ((0, 0), (0, 1), (1, 0), (1, 1)))
    merged = (x.flatten(1)[:, order.token.sum()] * order.valid.product().squeeze(1)).view(3, -1, 4)
    padded = F.pad(x, (0, width % 2, 0, height % 2))
    expected = F.unfold(padded.unsqueeze(0), 2, stride=2)[0].view(3, 4, -1)
    assert torch.equal(merged, expected.transpose(1, 2))


def test_sizes_may_be_tensors():
    """As while a graph of variable size is traced."""
    fixed = window_order(15, 10, (7, 7), (3, 3), False)
    traced = window_order(torch.tensor(15), torch.tensor(10), (7, 7), (3, 3), False)
    for a, b in zip(fixed, traced):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.cols, b.cols)

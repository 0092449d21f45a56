# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Padding in Swin's windows, against mmdet's own partition of a marked map."""
import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import ShiftWindowMSA

from psaq_mm.adapters.window_tokens import valid_tokens


def literal(height, width, window, shift):
    """Mark real tokens by 1, then do to the map what the host does."""
    host = ShiftWindowMSA(embed_dims=4, num_heads=1, window_size=window, shift_size=shift)
    marked = torch.ones(1, height, width, 1)
    right = (window - width % window) % window
    bottom = (window - height % window) % window
    marked = F.pad(marked, (0, 0, 0, right, 0, bottom))
    if shift > 0:
        marked = torch.roll(marked, shifts=(-shift, -shift), dims=(1, 2))
    return host.window_partition(marked).view(-1, window**2) == 1


@pytest.mark.parametrize('window, shift', [(7, 0), (7, 3), (4, 0), (4, 2), (3, 1), (12, 6)])
@pytest.mark.parametrize('height, width', [
    (13, 9), (9, 13), (15, 14), (14, 15), (1, 1), (5, 30), (25, 42), (23, 1)
])
def test_equals_the_partition_of_a_marked_map(height, width, window, shift):
    expected = literal(height, width, window, shift)
    valid = valid_tokens(height, width, window, shift)
    if expected.all():
        assert valid is None
    else:
        assert valid.dtype == torch.bool
        assert torch.equal(valid, expected)
        assert valid.sum() == height * width


def test_by_hand():
    # 2x3 tokens in windows of 2: one column of padding at the right.
    assert valid_tokens(2, 3, 2, 0).int().tolist() == [[1, 1, 1, 1], [1, 0, 1, 0]]
    # Rolled by -1, the first column comes last.
    assert valid_tokens(2, 3, 2, 1).int().tolist() == [[1, 1, 1, 1], [0, 1, 0, 1]]


@pytest.mark.parametrize('height, width', [(7, 7), (14, 21), (56, 56)])
@pytest.mark.parametrize('shift', [0, 3])
def test_no_padding(height, width, shift):
    assert valid_tokens(height, width, 7, shift) is None
    assert literal(height, width, 7, shift).all()


def test_usable_with_gradients_after_inference_mode():
    valid_tokens.cache_clear()
    with torch.inference_mode():
        valid_tokens(5, 5, 4, 2)
    x = torch.ones(4, 16, requires_grad=True)
    torch.where(valid_tokens(5, 5, 4, 2), x, torch.zeros(())).sum().backward()
    assert x.grad.sum() == 25

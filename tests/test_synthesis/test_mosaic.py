# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images of another size, out of the same pixels."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.synthesis import mosaic_count, mosaics


def plain(count, height=4, width=4, channels=1):
    """Images of one value each: 1, 2, ..."""
    values = torch.arange(1., count + 1).view(-1, 1, 1, 1)
    return values.expand(count, channels, height, width).clone()


def test_one_image_by_hand():
    image = torch.arange(6.).view(1, 1, 2, 3)
    expected = torch.tensor([[0., 1., 2., 0.], [3., 4., 5., 3.], [0., 1., 2., 0.]])
    assert torch.equal(mosaics(image, (3, 4)), expected.view(1, 1, 3, 4))


def test_four_tiles_by_hand():
    """All four images, each whole, in the order that the seed gives."""
    images = plain(4, 2, 3)
    whole = mosaics(images, (4, 6), seed=5)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(5)) + 1.
    expected = order.view(2, 2).repeat_interleave(2, 0).repeat_interleave(3, 1)
    assert torch.equal(whole, expected.view(1, 1, 4, 6))


def test_same_size_is_left_alone():
    images = torch.randn(3, 3, 8, 6)
    assert mosaics(images, (8, 6)) is images
    assert mosaics(images, (6, 8)) is not images
    assert mosaic_count(images, (8, 6)) == 3


@given(count=st.integers(1, 7), height=st.integers(1, 6), width=st.integers(1, 6),
       to=st.tuples(st.integers(1, 17), st.integers(1, 17)), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_each_tile_is_an_image(count, height, width, to, seed):
    """Whole, or cut at the right and at the bottom."""
    images = torch.randn(count, 2, height, width,
                         generator=torch.Generator().manual_seed(seed))
    whole = mosaics(images, to, seed)
    assert whole.shape[1:] == (2, *to)
    if to != (height, width):
        wanted = max(1, math.ceil(count * height * width / (to[0] * to[1])))
        assert len(whole) == wanted == mosaic_count(images, to)
        assert whole.is_contiguous()
    for mosaic in whole:
        for top in range(0, to[0], height):
            for left in range(0, to[1], width):
                tile = mosaic[:, top:top + height, left:left + width]
                assert any(torch.equal(tile, image[:, :tile.shape[1], :tile.shape[2]])
                           for image in images)


@given(count=st.integers(1, 6), rows=st.integers(1, 3), columns=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_images_are_used_equally_often(count, rows, columns):
    whole = mosaics(plain(count), (4 * rows, 4 * columns))
    tiles = whole[:, 0, ::4, ::4].flatten()
    uses = torch.bincount(tiles.long(), minlength=count + 1)[1:]
    assert uses.sum() == tiles.numel()
    assert int(uses.max() - uses.min()) <= 1


def test_about_as_many_pixels_as_before():
    assert mosaics(plain(8, 224, 224), (800, 1088)).shape == (1, 1, 800, 1088)
    assert mosaics(plain(32, 32, 32), (64, 96)).shape == (6, 1, 64, 96)  # 5.3
    assert mosaics(plain(3, 8, 8), (4, 4)).shape == (12, 1, 4, 4)  # smaller: cuts


def test_seed():
    images = plain(9)
    one, same, other = (mosaics(images, (12, 12), seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    before = torch.get_rng_state()
    mosaics(images, (12, 12))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('size', [(9, 9), (2, 3)])
def test_images_are_not_changed(size):
    images = torch.randn(2, 3, 4, 4)
    kept = images.clone()
    mosaics(images, size).zero_()
    assert torch.equal(images, kept)

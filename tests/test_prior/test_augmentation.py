# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tests of the random shifts and flips."""
import pytest
import torch

from psaq_mm.prior.augmentation import random_flip, random_roll


def _images(count=2):
    return torch.arange(count * 3 * 6 * 7, dtype=torch.float32).reshape(count, 3, 6, 7)


def _draws(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _offsets(max_shift, count):
    """The (vertical, horizontal) shifts of images, read off one bright pixel of each."""
    images = torch.zeros(count, 1, 9, 9)
    images[:, 0, 4, 4] = 1
    rolled = random_roll(images, max_shift, _draws(count, 2))
    return [tuple((image[0].nonzero()[0] - 4).tolist()) for image in rolled]


def test_roll_reaches_every_offset_and_none_beyond():
    seen = set(_offsets(2, 400))
    assert seen == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_roll_takes_a_limit_for_each_direction():
    seen = set(_offsets((1, 3), 200))
    assert {i for i, _ in seen} == {-1, 0, 1}
    assert {j for _, j in seen} == set(range(-3, 4))


@pytest.mark.parametrize('limit', [1, 2, 15, 30, 96, 224])
def test_ends_of_the_range_of_draws(limit):
    """The largest draw that there is, too."""
    image = torch.arange(1000.).view(1, 1, 1, 1000)
    for draw, shift in [(0., -limit), (1 - 2**-53, limit), (0.5, 0)]:
        draws = torch.tensor([[0.5, draw]], dtype=torch.float64)
        assert torch.equal(random_roll(image, (0, limit), draws), image.roll(shift, -1))


def test_each_image_has_its_own_shift_and_flip():
    images, draws = _images(5), _draws(5, 3)
    together = random_flip(random_roll(images, 3, draws[:, 1:]), 0.5, draws[:, 0])
    alone = [random_flip(random_roll(image[None], 3, row[None, 1:]), 0.5, row[None, 0])
             for image, row in zip(images, draws)]
    assert torch.equal(together, torch.cat(alone))
    rolled = random_roll(images, 3, draws[:, 1:])
    assert torch.equal(rolled.flatten(1).sort().values, images.flatten(1))
    assert len({tuple((a - a.min()).flatten().tolist()) for a in rolled}) > 3


def test_no_shift_is_the_identity():
    assert torch.equal(random_roll(_images(), 0, _draws(2, 2)), _images())


def test_flip_probability():
    images = _images(400)
    flipped = (random_flip(images, 0.25, _draws(400)) == images.flip(-1)).flatten(1).all(1)
    kept = (random_flip(images, 0.25, _draws(400)) == images).flatten(1).all(1)
    assert 70 <= flipped.sum() <= 130
    assert (flipped ^ kept).all()
    assert torch.equal(random_flip(images, 0., _draws(400)), images)
    assert torch.equal(random_flip(images, 1., _draws(400)), images.flip(-1))


def test_gradient_flows_back_to_where_it_belongs():
    images = _images().requires_grad_()
    out = random_flip(random_roll(images, 3, _draws(2, 2)), 1., _draws(2))
    weight = _draws(*out.shape).float()
    (out * weight).sum().backward()
    # The pixel that now lies at some place must get the weight of that place.
    expected = torch.empty(images.numel())
    expected[out.detach().long().flatten()] = weight.flatten()
    assert torch.equal(images.grad.flatten(), expected)

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tests of the random shifts and flips."""
import torch

from psaq_mm.prior.augmentation import random_flip, random_roll


def _images():
    return torch.arange(2 * 3 * 6 * 7, dtype=torch.float32).reshape(2, 3, 6, 7)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _offset(max_shift, seed):
    """The (vertical, horizontal) shift that a seed leads to, read off one bright pixel."""
    images = torch.zeros(1, 1, 101, 101)
    images[0, 0, 50, 50] = 1
    rolled = random_roll(images, max_shift, _generator(seed))
    return tuple((rolled[0, 0].nonzero()[0] - 50).tolist())


def test_roll_reaches_every_offset_and_none_beyond():
    seen = {_offset(2, seed) for seed in range(400)}
    assert seen == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_roll_takes_a_limit_for_each_direction():
    seen = {_offset((1, 3), seed) for seed in range(200)}
    assert {i for i, _ in seen} == {-1, 0, 1}
    assert {j for _, j in seen} == set(range(-3, 4))


def test_roll_moves_the_whole_batch_together():
    images = _images()
    rolled = random_roll(images, 3, _generator(2))
    assert not torch.equal(rolled, images)
    assert torch.equal(rolled.flatten().sort().values, images.flatten())
    # Values are their own addresses, so a common shift is a common difference, pixel by pixel.
    torch.testing.assert_close(rolled - rolled[:1, :1], images - images[:1, :1])


def test_no_shift_is_the_identity():
    assert torch.equal(random_roll(_images(), 0, _generator(0)), _images())


def test_flip_probability():
    images = _images()
    flipped = sum(
        torch.equal(random_flip(images, 0.25, _generator(seed)), images.flip(-1))
        for seed in range(400))
    assert 70 <= flipped <= 130
    assert torch.equal(random_flip(images, 0., _generator(0)), images)
    assert torch.equal(random_flip(images, 1., _generator(0)), images.flip(-1))


def test_same_seed_same_bits():
    for seed in range(5):
        first, second = _generator(seed), _generator(seed)
        for _ in range(3):
            a = random_flip(random_roll(_images(), 3, first), 0.5, first)
            b = random_flip(random_roll(_images(), 3, second), 0.5, second)
            assert torch.equal(a, b)


def test_number_of_draws_does_not_depend_on_the_arguments():
    states = []
    for max_shift, probability in [(0, 0.), (30, 1.)]:
        generator = _generator(4)
        random_flip(random_roll(_images(), max_shift, generator), probability, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_gradient_flows_back_to_where_it_belongs():
    images = _images().requires_grad_()
    out = random_flip(random_roll(images, 3, _generator(1)), 1., _generator(1))
    weight = torch.rand(out.shape, generator=_generator(0))
    (out * weight).sum().backward()
    # The pixel that now lies at some place must get the weight of that place.
    expected = torch.empty(images.numel())
    expected[out.detach().long().flatten()] = weight.flatten()
    assert torch.equal(images.grad.flatten(), expected)

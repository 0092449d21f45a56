# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tests of the total variation prior's functions."""
import math

import pytest
import torch

from psaq_mm.prior.total_variation import (
    total_variation,
    total_variation_loss,
    total_variation_target,
)


def test_two_by_two_by_hand():
    images = torch.tensor([[[[1., 4.], [6., 2.]]]])
    horizontal = math.sqrt(3**2 + 4**2)
    vertical = math.sqrt(5**2 + 2**2)
    diagonals = 2 + 1  # |6 - 4| and |1 - 2|
    assert total_variation(images).item() == pytest.approx(horizontal + vertical + diagonals)


def test_three_by_three_by_hand():
    images = torch.tensor([[[[0., 1., 3.], [2., 2., 2.], [5., 0., 1.]]]])
    horizontal = math.sqrt(1 + 4 + 0 + 0 + 25 + 1)
    vertical = math.sqrt(4 + 1 + 1 + 9 + 4 + 1)
    falling = math.sqrt(4 + 1 + 4 + 1)  # 0-2, 1-2, 2-0, 2-1
    rising = math.sqrt(1 + 1 + 9 + 4)  # 2-1, 2-3, 5-2, 0-2
    expected = horizontal + vertical + falling + rising
    assert total_variation(images).item() == pytest.approx(expected, rel=1e-6)


def test_norm_is_over_the_whole_batch():
    images = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    one = total_variation(images)
    torch.testing.assert_close(total_variation(images.repeat(4, 1, 1, 1)), 2 * one)


def test_flat_images_have_neither_variation_nor_gradient():
    images = torch.full((2, 3, 4, 4), 0.3, requires_grad=True)
    loss = total_variation(images)
    loss.backward()
    assert loss.item() == 0
    assert (images.grad == 0).all()


def test_gradient():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0),
                        dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total_variation, (images, ))
    assert torch.autograd.gradcheck(lambda x: total_variation_loss(x, 100.), (images, ))


def test_half_precision_does_not_overflow():
    images = torch.full((1, 1, 200, 200), 50., dtype=torch.float16)
    images[..., ::2] = -50
    assert total_variation(images).isfinite()


def _target(*shape, seed=0, **kwargs):
    return total_variation_target(*shape, torch.Generator().manual_seed(seed), **kwargs)


def test_target_range_and_scaling():
    draws = [_target(32, 224, 224, seed=seed) for seed in range(200)]
    assert 2500 <= min(draws) < 2520
    assert 2980 < max(draws) <= 3000
    reference = _target(32, 224, 224)
    assert _target(8, 224, 224) == pytest.approx(reference / 2)
    assert _target(32, 448, 448) == pytest.approx(reference * 2)
    assert _target(8, 448, 224) == pytest.approx(reference / math.sqrt(2))
    assert _target(32, 224, 224, low=7., high=7.) == 7


def test_target_is_the_same_for_the_same_seed():
    assert _target(4, 224, 224, seed=5) == _target(4, 224, 224, seed=5)
    assert _target(4, 224, 224, seed=5) != _target(4, 224, 224, seed=6)


def test_loss_is_the_distance_either_way():
    images = torch.tensor([[[[1., 4.], [6., 2.]]]])
    variation = total_variation(images).item()
    assert total_variation_loss(images, variation + 2).item() == pytest.approx(2, abs=1e-4)
    assert total_variation_loss(images, variation - 3).item() == pytest.approx(3, abs=1e-4)

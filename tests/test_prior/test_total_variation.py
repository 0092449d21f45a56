# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tests of the total variation prior's functions."""
import math

import pytest
import torch
import torch.nn.functional as F

from psaq_mm.prior import (
    AttentionRecord,
    PatchSimilarityPrior,
    PriorState,
    TotalVariationPrior,
    patch_similarity_entropy,
)
from psaq_mm.prior.total_variation import total_variation, total_variation_loss


def test_two_by_two_by_hand():
    images = torch.tensor([[[[1., 4.], [6., 2.]]]])
    horizontal = math.sqrt(3**2 + 4**2)
    vertical = math.sqrt(5**2 + 2**2)
    diagonals = 2 + 1  # |6 - 4| and |1 - 2|
    assert total_variation(images).tolist() == pytest.approx([horizontal + vertical + diagonals])


def test_three_by_three_by_hand():
    images = torch.tensor([[[[0., 1., 3.], [2., 2., 2.], [5., 0., 1.]]]])
    horizontal = math.sqrt(1 + 4 + 0 + 0 + 25 + 1)
    vertical = math.sqrt(4 + 1 + 1 + 9 + 4 + 1)
    falling = math.sqrt(4 + 1 + 4 + 1)  # 0-2, 1-2, 2-0, 2-1
    rising = math.sqrt(1 + 1 + 9 + 4)  # 2-1, 2-3, 5-2, 0-2
    expected = horizontal + vertical + falling + rising
    assert total_variation(images).tolist() == pytest.approx([expected], rel=1e-6)


def test_each_image_has_its_own():
    images = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([total_variation(image[None]) for image in images])
    assert torch.equal(total_variation(images), alone)
    assert alone.unique().numel() == 4


def test_flat_images_have_neither_variation_nor_gradient():
    images = torch.full((2, 3, 4, 4), 0.3, requires_grad=True)
    loss = total_variation(images)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (images.grad == 0).all()


def test_gradient():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0),
                        dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1e5, 10.], dtype=torch.float64)
    assert torch.autograd.gradcheck(total_variation, (images, ))
    assert torch.autograd.gradcheck(lambda x: total_variation_loss(x, target), (images, ))


def test_half_precision_does_not_overflow():
    images = torch.full((1, 1, 200, 200), 50., dtype=torch.float16)
    images[..., ::2] = -50
    assert total_variation(images).isfinite().all()


def test_loss_is_the_distance_either_way():
    images = torch.tensor([[[[1., 4.], [6., 2.]]]])
    variation = total_variation(images).item() * math.sqrt(32) * 112
    for target in (variation + 2, variation - 3):
        assert total_variation_loss(images, target).item() == pytest.approx(
            abs(variation - target), rel=1e-3)
    both = total_variation_loss(images.repeat(2, 1, 1, 1),
                                torch.tensor([variation, variation + 5]))
    assert both.tolist() == pytest.approx([0, 5], abs=1e-2)


# The balance of the two terms


def _alike(count, side, seed=0):
    """Images that differ little, as smooth as V1's targets ask."""
    g = torch.Generator().manual_seed(seed)
    base = F.interpolate(torch.randn(1, 3, side // 7, side // 7, generator=g), (side, side),
                         mode='bilinear')
    return base + 0.02 * torch.randn(count, 3, side, side, generator=g)


def _tokens(images, pool=1):
    """A stand-in for attention: windows of 7 x 7 pixels, after a pooling."""
    pixels = F.avg_pool2d(images, pool)
    windows = pixels.unfold(2, 7, 7).unfold(3, 7, 7)  # (B, 3, rows, columns, 7, 7)
    return windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, 49, 3) + 0.5


def _gradient_norms(loss, images):
    gradient, = torch.autograd.grad(loss, images)
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1)


def _ratios(images, pool=1, weight=0.05):
    """Of the norms of the terms' gradients, for each image."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(images))]
    attention = [AttentionRecord(_tokens(images, pool)[:, :, None])]
    state = PriorState(images=images, attention=attention, generators=generators)
    smooth = TotalVariationPrior(weight)(state).sum()
    diverse = PatchSimilarityPrior()(state).sum()
    return _gradient_norms(smooth, images) / _gradient_norms(diverse, images)


def test_balance_is_that_of_v1():
    """V1's formula, written down again: a mean of entropies and norms over a whole batch."""
    images = _alike(32, 224).requires_grad_()
    x, rest = images, -1
    total = (torch.norm(x[..., :-1] - x[..., 1:]) + torch.norm(x[..., :-1, :] - x[..., 1:, :])
             + torch.norm(x[..., 1:, :rest] - x[..., :rest, 1:])
             + torch.norm(x[..., :rest, :rest] - x[..., 1:, 1:]))
    smooth = 0.05 * torch.abs(total - 2750.)
    diverse = -patch_similarity_entropy(_tokens(images, 8), 32).mean()
    expected = _gradient_norms(smooth, images) / _gradient_norms(diverse, images)
    torch.testing.assert_close(_ratios(images, 8), expected, rtol=0.03, atol=0.)
    # and the target means the same
    mine = total_variation_loss(images, 0.)
    torch.testing.assert_close(mine, total.expand(32), rtol=0.01, atol=0.)


def test_balance_does_not_depend_on_the_batch():
    images = _alike(8, 28)
    together = _ratios(images.clone().requires_grad_())
    alone = [_ratios(image[None].clone().requires_grad_()) for image in images]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize('rows, columns', [(2, 2), (1, 4), (3, 2)])
def test_balance_does_not_depend_on_the_size(rows, columns):
    images = _alike(2, 56)
    images = torch.cat([images, images.flip(-1)], -1)  # so that copies join without a step
    images = torch.cat([images, images.flip(-2)], -2)
    larger = images.repeat(1, 1, rows, columns)
    torch.testing.assert_close(_ratios(larger.requires_grad_()),
                               _ratios(images.requires_grad_()), rtol=0.02, atol=0.)


def test_default_is_half_of_v1s():
    """0.05 for a batch of 8 at 224, by V1's formula: 0.05 sqrt(8) = 0.025 sqrt(32)."""
    assert TotalVariationPrior().weight * math.sqrt(32) == pytest.approx(0.05 * math.sqrt(8))

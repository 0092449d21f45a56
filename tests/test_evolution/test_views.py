# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tests of what the student learns from."""
import torch

from psaq_mm.evolution.views import random_blend, random_zoom

LOWER, UPPER = torch.tensor([-2., -1., 0.]).view(1, 3, 1, 1), torch.tensor([1., 2., 3.]).view(
    1, 3, 1, 1)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _ramp(height=24, width=36):
    """Each pixel's value is its place, down in the first channel and right in the second."""
    down = torch.arange(float(height)).view(-1, 1).expand(height, width)
    right = torch.arange(float(width)).expand(height, width)
    return torch.stack([down, right]).unsqueeze(0)


def test_zoom_magnifies_a_part():
    """On ramps: a view is a ramp too, of a slope of one over the factor, within the image."""
    factors = []
    for seed in range(200):
        view = random_zoom(_ramp(), 3., _generator(seed))
        assert view.shape == (1, 2, 24, 36)
        down = view[0, 0, 6:-6, :].diff(dim=0)  # interpolation is flat beyond the last centres
        right = view[0, 1, :, 6:-6].diff(dim=1)
        assert torch.allclose(down, down.mean(), atol=1e-4)
        assert torch.allclose(right, right.mean(), atol=1e-4)
        assert torch.allclose(view[0, 0], view[0, 0, :, :1].expand(24, 36), atol=1e-4)
        assert view.min() >= 0 and view[0, 0].max() < 23.001 and view[0, 1].max() < 35.001
        factors.append((1 / float(down.mean()), 1 / float(right.mean())))
    for a, b in factors:  # the same in both directions, but for whole pixels of the part
        assert abs(a - b) < 0.25 and 0.95 < a < 3.1
    mean = sum(a for a, _ in factors) / len(factors)
    assert 1.85 < mean < 2.15
    assert max(a for a, _ in factors) > 2.7 and min(a for a, _ in factors) < 1.2


def test_zoom_reaches_all_corners():
    """Parts start at the first pixel, and end at the last."""
    views = [random_zoom(_ramp(), 3., _generator(seed)) for seed in range(300)]
    assert min(float(v[0, 0].min()) for v in views) == 0
    assert max(float(v[0, 0].max()) for v in views) > 22.999
    assert max(float(v[0, 1].max()) for v in views) > 34.999


def test_each_image_has_its_own_view():
    images = torch.rand(1, 3, 20, 20, generator=_generator()).expand(4, 3, 20, 20)
    for views in (random_zoom(images, 2., _generator()),
                  random_blend(images.clone(), 0.3, LOWER, UPPER, _generator())):
        assert all(not torch.equal(views[0], views[i]) for i in range(1, 4))


def test_blend():
    """Contrast falls by one factor for an image, uniform in [least, 1], and what is missing
    is one colour, uniform over the valid pixels; black stays in, and white."""
    images = LOWER + (UPPER - LOWER) * torch.rand(400, 3, 6, 6, generator=_generator(1))
    images[:, :, 0, 0], images[:, :, 0, 1] = LOWER.view(1, 3), UPPER.view(1, 3)
    views = random_blend(images, 0.25, LOWER, UPPER, _generator(2))
    spread = (UPPER - LOWER).view(1, 3)
    contrast = (views[:, :, 0, 1] - views[:, :, 0, 0]) / spread
    assert torch.allclose(contrast, contrast[:, :1].expand(-1, 3), atol=1e-5)
    factor = contrast[:, 0].view(-1, 1, 1, 1)
    assert factor.min() >= 0.25 and factor.max() <= 1 and abs(factor.mean() - 0.625) < 0.04
    colour = (views - factor * images) / (1 - factor).clamp(min=0.02)
    kept = (factor < 0.95).flatten()
    assert (colour[kept] - colour[kept][:, :, :1, :1]).abs().max() < 1e-4
    place = ((colour[kept, :, 0, 0] - LOWER.view(1, 3)) / spread)
    assert place.min() > -1e-4 and place.max() < 1 + 1e-4
    assert (place.mean(0) - 0.5).abs().max() < 0.06
    assert (views >= LOWER - 1e-6).all() and (views <= UPPER + 1e-6).all()


def test_one_is_the_identity():
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(random_zoom(images, 1., _generator()), images)
    assert torch.equal(random_blend(images, 1., LOWER, UPPER, _generator()), images)


def test_number_of_draws_does_not_depend_on_the_arguments():
    states = []
    for zoom, contrast in ((1., 1.), (3., 0.2)):
        generator, images = _generator(), torch.rand(3, 3, 8, 8)
        random_blend(random_zoom(images, zoom, generator), contrast, LOWER, UPPER, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The best class of each pixel is that of logits which torch resizes."""
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from psaq_mm.runtime.images import Prepared
from psaq_mm.runtime.model import interpret

GIVEN = 48, 64


def label_map(planes, size, image, corners=False):
    info = dict(task='segmentation', classes=[str(i) for i in range(len(planes))],
                align_corners=corners, threshold=None)
    prepared = Prepared(np.zeros((1, 3, *GIVEN), np.float32), size, image)
    return interpret([planes[None]], prepared, info, np.zeros((*image, 3), np.uint8)).labels


@pytest.mark.parametrize('corners', [False, True])
@pytest.mark.parametrize('logits', [(12, 16), (9, 13), GIVEN])
@pytest.mark.parametrize('image', [GIVEN, (131, 171), (20, 31)])
@pytest.mark.parametrize('noise', [3., 0.3, 0.])
def test_the_best_class_of_each_pixel(corners, logits, image, noise):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(1, 20, 2, 3, generator=generator)
    planes = interpolate(smooth, logits, mode='bilinear', align_corners=True)
    planes = planes + noise * torch.randn(planes.shape, generator=generator)
    size = GIVEN if image == GIVEN else (40, 61)  # the rest is padding
    full = interpolate(planes, GIVEN, mode='bilinear', align_corners=corners)
    full = interpolate(full[..., :size[0], :size[1]], image, mode='bilinear',
                       align_corners=corners)[0].numpy()
    second, first = np.sort(full, 0)[-2:]
    found = label_map(planes[0].numpy(), size, image, corners)
    clear = first - second > 1e-4
    assert found.shape == image and found.dtype == np.int64 and clear.mean() > 0.99
    assert np.array_equal(found[clear], full.argmax(0)[clear])


@pytest.mark.parametrize('image', [GIVEN, (131, 171), (20, 31)])
def test_a_class_that_is_the_best_only_between_logits(image):
    """Two classes alternate; halfway between them the third is better than both."""
    first = np.indices((12, 16)).sum(0) % 2 * 2. - 1
    planes = np.stack([first, -first, np.full_like(first, 0.5)]).astype(np.float32)
    assert set(np.unique(planes.argmax(0))) == {0, 1}
    found = label_map(planes, GIVEN, image)
    assert set(np.unique(found)) == {0, 1, 2} and (found == 2).mean() > 0.3

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a graph takes of an image: the sizes of mmcv, padding, and what does not fit."""
import mmcv
import numpy as np
import pytest

from psaq_mm.errors import UserError
from psaq_mm.runtime.images import prepare, resized_size

INFO = dict(resize=dict(mode='fit', size=[64, 40]), size=None, padding=[1., 2., 3.])


@pytest.mark.parametrize('size', [(30, 50), (50, 30), (33, 47), (200, 40), (40, 200), (64, 40)])
def test_the_sizes_of_mmcv(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = mmcv.imrescale(image, (64, 40))
    prepared = prepare(image, INFO)
    assert prepared.size == expected.shape[:2] and prepared.original == size
    assert np.array_equal(prepared.array[0].transpose(1, 2, 0), expected.astype(np.float32))
    assert prepared.scale == pytest.approx([expected.shape[1] / size[1],
                                            expected.shape[0] / size[0]] * 2)


@pytest.mark.parametrize('rule, size', [
    (dict(mode='stretch', size=[20, 30]), (20, 30)), (dict(mode='none'), (30, 50)),
    (dict(mode='factor', factor=[2., 0.5]), (60, 25)), (dict(mode='crop', short=15), (15, 25))])
def test_rules(rule, size):
    assert resized_size(30, 50, rule) == size


def test_padding():
    """At the bottom and on the right, with the pixel that becomes zero."""
    image = np.full((40, 50, 3), 9, np.uint8)
    prepared = prepare(image, dict(INFO, size=[40, 64]))
    assert prepared.array.shape == (1, 3, 40, 64) and prepared.size == (40, 50)
    assert (prepared.array[..., :50] == 9).all()
    assert (prepared.array[..., 50:] == np.array([1, 2, 3]).reshape(1, 3, 1, 1)).all()


def test_an_image_that_does_not_fit():
    image = np.zeros((100, 50, 3), np.uint8)
    info = dict(INFO, size=[40, 64])
    with pytest.raises(UserError, match=r'40 x 64 pixels.*64 x 32.*--size 64 32'):
        prepare(image, info)
    assert prepare(image, info, shrink=True).size == (40, 20)


def test_an_unknown_rule():
    info = dict(INFO, resize=dict(mode='unknown', step='the test pipeline has the step Pad'))
    image = np.zeros((40, 64, 3), np.uint8)
    with pytest.raises(UserError, match='the step Pad.*resize=False'):
        prepare(image, info)
    assert prepare(image, info, resize=False).array.shape == (1, 3, 40, 64)


def test_large_images_are_averaged_for_classifiers():
    """As Pillow does it for timm: one pixel of many would be noise."""
    image = pytest.importorskip('PIL.Image')
    pixels = np.random.default_rng(0).integers(0, 256, (320, 480, 3), dtype=np.uint8)
    info = dict(INFO, resize=dict(mode='crop', short=40, size=[32, 32]))
    found = prepare(pixels, info).array[0].transpose(1, 2, 0)
    resized = image.fromarray(pixels).resize((60, 40), image.Resampling.BOX)
    assert np.abs(found - np.asarray(resized)[4:36, 14:46]).max() <= 1

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pictures of results, against colours mixed pixel by pixel."""
import numpy as np
import pytest
from pycocotools import mask as mask_util

from psaq_mm.runtime.masks import Crop, run_lengths
from psaq_mm.runtime.results import Detections, Segmentation, color_of

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (40, 50, 3)).astype(np.uint8)


def mixed(picture, inside, label):
    """Half of the image, half of a colour, for each pixel of a mask."""
    for y, x in zip(*np.nonzero(inside)):
        for channel, color in enumerate(color_of(label)):
            picture[y, x, channel] = (int(picture[y, x, channel]) + color) // 2


@pytest.mark.parametrize('layout', ['plain', 'strided', 'fortran'])
def test_masks_are_mixed_half_and_half(layout):
    masks = np.zeros((3, 40, 50), bool)
    masks[0, 5:20, 10:30] = RANDOM.random((15, 20)) > 0.5
    masks[1, 0, 0] = masks[1, 39, 49] = True  # far apart; the third holds nothing
    given = dict(plain=masks, strided=np.repeat(masks, 2, 2)[..., ::2],
                 fortran=np.asfortranarray(masks))[layout]
    crops = [Crop(5, 2, given[0][2:30, 5:40]), Crop(0, 0, given[1]), Crop(0, 0, given[2][:0, :0])]
    # Boxes without area at the border: only masks are compared.
    found = Detections(IMAGE, ['a', 'b', 'c'], np.zeros((3, 4)), np.array([0.9, 0.8, 0.7]),
                       np.array([0, 1, 2]), crops)
    assert np.array_equal(found.masks, masks)
    unmasked = Detections(IMAGE, found.classes, found.boxes, found.scores, found.labels)
    expected = IMAGE.copy()
    for label in (1, 0):  # the surest on top
        mixed(expected, masks[label], label)
    text = (unmasked.draw() != IMAGE).any(-1)
    assert 0 < text.sum() < 800
    assert np.array_equal(found.draw()[~text], expected[~text])


@pytest.mark.parametrize('left,top,height,width', [
    (0, 0, 7, 9), (2, 0, 7, 3), (0, 3, 4, 9), (8, 6, 1, 1), (3, 2, 3, 4), (0, 0, 0, 0)])
@pytest.mark.parametrize('density', [0.5, 1.1])
def test_run_lengths_are_those_of_the_whole_mask(left, top, height, width, density):
    """As pycocotools decodes them; also where columns are full and runs go on over them."""
    mask = np.zeros((7, 9), bool)
    crop = Crop(left, top, np.random.default_rng(0).random((height, width)) < density)
    mask[crop.part] = crop.pixels
    lengths = run_lengths(crop, mask.shape)
    assert sum(lengths['counts']) == mask.size
    assert 0 not in lengths['counts'][1:-1]
    decoded = mask_util.decode(mask_util.frPyObjects(lengths, *lengths['size']))
    assert np.array_equal(decoded.astype(bool), mask)


def test_segments_are_mixed_half_and_half():
    labels = RANDOM.integers(0, 4, (40, 50))
    expected = IMAGE.copy()
    for label in range(4):
        mixed(expected, labels == label, label)
    assert np.array_equal(Segmentation(IMAGE, list('abcd'), labels).draw(), expected)


@pytest.mark.parametrize('top', [0, 3, 60])
@pytest.mark.parametrize('scale', [1, 8])
def test_labels_are_readable_on_a_background(top, scale):
    """Letters of the class's colour on black, inside of the image, whatever is behind."""
    image = np.full((100 * scale, 200 * scale, 3), 200, np.uint8)
    found = Detections(image, ['cat'], np.array([[20., top, 90., 90.]]) * scale, np.array([0.9]),
                       np.array([0]))
    drawn = found.draw()
    black, color = (drawn == 0).all(-1), (drawn == color_of(0)).all(-1)
    rows, columns = np.nonzero(black)
    assert len(rows) > 300 and color.sum() > 30
    ground = drawn[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
    assert ground[(ground == image[0, 0]).all(-1)].size == 0
    if top == 60:  # above the box
        assert rows.max() <= top * scale

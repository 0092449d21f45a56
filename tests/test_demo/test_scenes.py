# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The demo's scenes: seeded, well-formed COCO."""
import hashlib
import json

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO


def test_same_seed_same_pixels(scenes):
    (first, boxes), (again, boxes_again) = scenes.render(5), scenes.render(5)
    assert np.array_equal(first, again) and boxes == boxes_again
    assert not np.array_equal(first, scenes.render(6)[0])


def test_annotations_are_consistent(scenes):
    """Masks lie in the image, do not overlap, and fill their boxes."""
    for seed in range(1_000_000, 1_000_008):
        image, annotations = scenes.render(seed)
        assert image.shape == (scenes.SIZE, scenes.SIZE, 3) and image.dtype == np.uint8
        total = np.zeros((scenes.SIZE, scenes.SIZE), int)
        for annotation in annotations:
            mask = coco_mask.decode(annotation['segmentation'])
            assert mask.sum() == annotation['area'] >= 60
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation['bbox']
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            total += mask
        assert total.max() <= 1


def test_split_is_coco(scenes, tmp_path):
    path = scenes.write_split('val', tmp_path, 4)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    coco = COCO(str(path))
    assert len(coco.getImgIds()) == 4
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(scenes.CLASSES)
    assert {a['image_id'] for a in coco.loadAnns(coco.getAnnIds())} <= {1, 2, 3, 4}
    assert len(json.loads(path.read_text())['annotations']) >= 4
    assert hashlib.sha256(scenes.write_split('val', tmp_path, 4).read_bytes()).hexdigest() \
        == digest


def test_splits_share_no_scene(scenes):
    (a, n), (b, m) = scenes.SPLITS['train'], scenes.SPLITS['val']
    assert not set(range(a, a + n)) & set(range(b, b + m))

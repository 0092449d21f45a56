# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The demo's scenes: seeded, well-formed COCO."""
import hashlib
import json
import shutil

import numpy as np
import pytest
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


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_forms_that_are_missing(scenes, tmp_path, monkeypatch):
    """``make demo`` renders the scenes alone; a benchmark afterwards needs the rest."""
    scenes.render_split('val', tmp_path / 'all', 3)
    whole = files_of(tmp_path / 'all')
    assert {name.split('/')[0] for name in whole} \
        == {'val', 'val.json', 'val_semantic', 'val_crops'}
    scenes.write_split('val', tmp_path / 'later', 3)
    scenes.render_split('val', tmp_path / 'later', 3)
    assert files_of(tmp_path / 'later') == whole
    monkeypatch.setattr(scenes, 'render', None)  # what is there is not made again
    scenes.render_split('val', tmp_path / 'later', 2)


@pytest.mark.parametrize('form', ['semantic', 'crops'])
def test_interrupted_form_is_made_again(scenes, tmp_path, monkeypatch, form):
    scenes.render_split('val', tmp_path, 3)
    whole = files_of(tmp_path)
    shutil.rmtree(tmp_path / f'val_{form}')

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(scenes.cv2, 'imwrite', stop)
        with pytest.raises(KeyboardInterrupt):
            scenes.render_split('val', tmp_path, 3)
    assert not (tmp_path / f'val_{form}').exists()
    scenes.render_split('val', tmp_path, 3)
    assert files_of(tmp_path) == whole


def test_more_scenes_renew_all_forms(scenes, tmp_path):
    scenes.render_split('val', tmp_path / 'grown', 2)
    scenes.render_split('val', tmp_path / 'grown', 4)
    scenes.render_split('val', tmp_path / 'at_once', 4)
    assert files_of(tmp_path / 'grown') == files_of(tmp_path / 'at_once')

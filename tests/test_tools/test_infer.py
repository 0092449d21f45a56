# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""tools/infer.py: pictures and predictions of detectors, segmentors and classifiers."""
import json

import cv2
import mmdet.apis
import mmseg.apis
import numpy as np
import pytest
import torch
from conftest import DEMO
from PIL import Image

import psaq_mm
from psaq_mm.engine.inference import find_images, side_by_side
from psaq_mm.errors import UserError
from psaq_mm.runtime.images import picture_paths

SIDE, GAP = 3 * 224, 8  # scenes are enlarged by 3


def infer(call_tool, out_dir, *arguments):
    status, out, err = call_tool('infer', *arguments, '--out-dir', out_dir, '--device', 'cpu')
    assert status == 0, err
    assert f'{out_dir}: ' in out
    return json.loads((out_dir / 'predictions.json').read_text())


def test_float_and_quantized_side_by_side(call_tool, photos, quantization_config, quantized_demo,
                                          demo_checkpoint, tmp_path):
    rows = infer(call_tool, tmp_path, quantization_config, quantized_demo, photos,
                 '--float', demo_checkpoint, '--score-thr', 0.5)
    assert [row['image'] for row in rows] == [str(photos / f'{i}.png') for i in range(2)]
    for row in rows:
        assert list(row['predictions']) == ['float', 'quantized, W8A8']
        with Image.open(tmp_path / row['picture']) as picture:
            width, height = picture.size
            pixels = np.asarray(picture)
        assert width == 2 * SIDE + GAP and SIDE < height < 1.1 * SIDE
        assert (pixels[:, SIDE:SIDE + GAP] == 255).all()
        left, right = pixels[-SIDE:, :SIDE], pixels[-SIDE:, -SIDE:]
        scene = cv2.cvtColor(cv2.imread(row['image']), cv2.COLOR_BGR2RGB)
        scene = cv2.resize(scene, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).astype(int)
        for side in (left, right):  # the scene, with something drawn on a part of it
            share = (abs(side - scene).max(-1) > 40).mean()
            assert 0.01 < share < 0.5
        # Masks vary in colour with the number of instances; where none is, nothing differs.
        assert (abs(left.astype(int) - right).max(-1) > 40).mean() < 0.3

    model = psaq_mm.init_model(quantization_config, demo_checkpoint)
    expected = mmdet.apis.inference_detector(model, str(photos / '0.png')).pred_instances
    expected = expected[expected.scores >= 0.5]
    found = rows[0]['predictions']['float']['instances']
    names = model.dataset_meta['classes']
    assert len(found) == len(expected) > 2
    for entry, box, score, label in zip(found, expected.bboxes, expected.scores, expected.labels):
        assert entry['bbox'] == pytest.approx(box.tolist(), abs=0.006)
        assert entry['score'] == pytest.approx(float(score), abs=6e-5)
        assert entry['label'] == int(label) and entry['class'] == names[label]


def test_segmentor(call_tool, photos, tmp_path):
    files = DEMO / 'upernet_swin_demo.py', DEMO / 'upernet_swin_demo.pth'
    row, = infer(call_tool, tmp_path, *files, photos / '0.png')
    model = mmseg.apis.init_model(*map(str, files), device='cpu')
    mask = mmseg.apis.inference_model(model, str(photos / '0.png')).pred_sem_seg.data
    expected = {name: float((mask == i).float().mean())
                for i, name in enumerate(model.dataset_meta['classes']) if (mask == i).any()}
    assert row['predictions'] == dict(float=dict(pixels=pytest.approx(expected, abs=6e-5)))
    assert Image.open(tmp_path / '0.png').size[0] == SIDE


def test_classifier(call_tool, photos, tmp_path):
    files = DEMO / 'swin_demo.py', DEMO / 'swin_demo.pth'
    row, = infer(call_tool, tmp_path, *files, photos / '1.png')
    top = row['predictions']['float']['top']
    assert len(top) == 5 and [e['score'] for e in top] == sorted(
        (e['score'] for e in top), reverse=True)
    # By hand: timm's transform is a resize to 112 pixels, crop_pct being 1.
    image = Image.open(photos / '1.png').convert('RGB').resize((112, 112), Image.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None]
    model = psaq_mm.init_model(*files)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406),
                                                         (0.229, 0.224, 0.225)))
    with torch.no_grad():
        scores = model.model((pixels / 255 - mean) / std).softmax(1)[0]
    assert top[0]['label'] == int(scores.argmax())
    assert top[0]['class'] == model.dataset_meta['classes'][top[0]['label']]
    assert top[0]['score'] == pytest.approx(float(scores.max()), abs=1e-3)
    assert Image.open(tmp_path / '1.png').size[1] > SIDE + 100  # classes stand below


def test_nothing_found(call_tool, photos, demo_config, demo_checkpoint, tmp_path):
    row, = infer(call_tool, tmp_path, demo_config, demo_checkpoint, photos / '0.png',
                 '--score-thr', 1.1)
    assert row['predictions'] == dict(float=dict(instances=[]))
    assert (tmp_path / '0.png').exists()


@pytest.fixture
def bad(tmp_path, photos):
    """Files that are no images, and a folder without one."""
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'readme.txt').write_text('no image')
    (tmp_path / 'text.png').write_text('no image')
    (tmp_path / 'cut.png').write_bytes((photos / '0.png').read_bytes()[:5000])
    return tmp_path


@pytest.mark.parametrize('image, message', [
    ('nowhere.png', 'nowhere.png does not exist'), ('empty', 'empty holds no images'),
    ('text.png', 'text.png cannot be read'), ('cut.png', 'cut.png cannot be read')])
def test_bad_images(image, message, bad, call_tool, photos, demo_config, demo_checkpoint):
    status, _, err = call_tool('infer', demo_config, demo_checkpoint, photos, bad / image,
                               '--out-dir', bad / 'out')
    assert status == 2 and message in err and err.startswith('error: ')
    assert not (bad / 'out').exists()


def test_bad_files(bad, call_tool, photos, demo_config, demo_checkpoint, quantized_demo):
    other = DEMO / 'upernet_swin_demo.pth'
    for arguments, message in (
            ((demo_config, other, photos, '--out-dir', bad / 'out'), 'upernet_swin_demo.pth'),
            ((demo_config, demo_checkpoint, photos, '--out-dir', bad / 'text.png' / 'out'),
             'text.png'),
            ((demo_config, demo_checkpoint, photos, '--out-dir', photos), 'would be overwritten'),
            ((demo_config, demo_checkpoint, photos, '--float', quantized_demo, '--out-dir',
              bad / 'out'), 'expected a float checkpoint'),
            ((demo_config, demo_checkpoint, photos, '--out-dir', bad / 'out', '--cfg-options',
              'test_dataloader.dataset.pipeline=[]'), 'how images are prepared')):
        status, _, err = call_tool('infer', *arguments)
        assert status == 2 and message in err.split('error: ')[1]
    assert not (bad / 'out').exists()


def test_names_of_pictures(tmp_path):
    images = [tmp_path / name for name in ('a/1.jpg', 'b/1.png', 'b/1_2.png', 'c/1.jpg')]
    found = picture_paths(images, str(tmp_path / 'out'))
    assert [path.name for path in found] == ['1.png', '1_2.png', '1_2_2.png', '1_3.png']
    with pytest.raises(UserError, match='b/1.png is an image that was given'):
        picture_paths(images, str(tmp_path / 'b'))


def test_folders_are_searched(tmp_path):
    (tmp_path / 'b').mkdir()
    for name in ('2.PNG', 'b/1.jpeg', '.3.png'):
        Image.new('RGB', (4, 4)).save(tmp_path / name)
    (tmp_path / 'note.txt').write_text('')
    assert find_images([str(tmp_path), str(tmp_path / '2.PNG')]) == [
        tmp_path / '2.PNG', tmp_path / 'b' / '1.jpeg', tmp_path / '2.PNG']


def test_row_of_panels():
    row = np.asarray(side_by_side([('red', np.full((40, 60, 3), (255, 0, 0), np.uint8)),
                                   ('blue', np.full((40, 60, 3), (0, 0, 255), np.uint8))], 5))
    assert row.shape[1] == 125 and (row[-40:, :60] == (255, 0, 0)).all()
    assert (row[-40:, 60:65] == 255).all() and (row[-40:, 65:] == (0, 0, 255)).all()
    title = row[:-40]
    assert title.min() < 100 and (title == 255).mean() > 0.5  # black letters on white

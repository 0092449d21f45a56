# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The size that a config tests at."""
import json
from pathlib import Path

import pytest
from conftest import DEMO, ROOT
from mmengine.config import Config

from psaq_mm.adapters import tested_size as module  # pytest collects what begins with test
from psaq_mm.engine import load_config


def find(config):
    return module.tested_size(config)


def size_of(config):
    return find(config).size


def config(*pipeline, preprocessor=None, **wrappers):
    dataset = dict(type='CocoDataset', pipeline=[dict(type='LoadImageFromFile'), *pipeline,
                                                 dict(type='PackDetInputs')])
    if wrappers:
        dataset = dict(type='RepeatDataset', dataset=dict(type='Other', dataset=dataset))
    return Config(dict(model=dict(type='X', data_preprocessor=preprocessor),
                       test_dataloader=dict(batch_size=1, dataset=dataset)))


def resize(scale, keep_ratio=True, kind='Resize'):
    return dict(type=kind, scale=scale, keep_ratio=keep_ratio)


PAD = dict(type='DetDataPreprocessor', pad_size_divisor=32)


@pytest.mark.parametrize('scale, keep_ratio, preprocessor, expected', [
    # The short side, and the long one of a photograph of 4:3.
    ((1333, 800), True, PAD, (800, 1088)),  # 1067, padded
    ((1333, 800), True, None, (800, 1067)),
    ((800, 1333), True, None, (800, 1067)),
    ([1333, 800], True, PAD, (800, 1088)),
    ((2048, 512), True, None, (512, 683)),
    ((1333, 750), True, dict(pad_size_divisor=64), (768, 1024)),
    # No wider than the scale allows: the long side limits.
    ((1000, 800), True, None, (750, 1000)),
    ((1000, 800), True, PAD, (768, 1024)),
    ((1001, 1000), True, None, (751, 1001)),
    ((224, 224), True, PAD, (224, 224)),
    ((224, 224), True, dict(pad_size_divisor=None), (224, 224)),
    (300, True, None, (300, 300)),
    # (width, height), whatever the image.
    ((300, 200), False, None, (200, 300)),
    ((200, 300), False, None, (300, 200)),
    ((200, 300), False, PAD, (320, 224)),
    (300, False, None, (300, 300)),
])
def test_resize(scale, keep_ratio, preprocessor, expected):
    assert size_of(config(resize(scale, keep_ratio), preprocessor=preprocessor)) == expected


def test_ratio_is_not_kept_by_default():
    assert size_of(config(dict(type='Resize', scale=(300, 200)))) == (200, 300)


def test_datasets_within_datasets():
    assert size_of(config(resize((1333, 800)), wrapped=True)) == (800, 1067)


@pytest.mark.parametrize('kind', ['mmdet.Resize', 'mmseg.Resize', 'mmcv.Resize'])
def test_scope_of_the_type(kind):
    assert size_of(config(resize((1333, 800), kind=kind))) == (800, 1067)


def test_steps_within_steps():
    wrapped = dict(type='RandomApply', transforms=[dict(type='RandomFlip'), resize((40, 20))])
    assert size_of(config(wrapped)) == (20, 27)
    listed = dict(type='TestTimeAug', transforms=[[resize((80, 60))], [dict(type='RandomFlip')]])
    assert size_of(config(listed)) == (60, 80)


def test_types_that_are_classes():
    """As in configs of mmengine's new style."""
    class Resize:
        pass

    assert size_of(config(resize((40, 20), kind=Resize))) == (20, 27)


def test_segmentor():
    """Slid over, a model sees windows; mmseg pads as its preprocessor says for tests."""
    whole = config(resize((2048, 512)), preprocessor=dict(test_cfg=dict(size_divisor=32)))
    assert size_of(whole) == (512, 704)
    whole.model.test_cfg = dict(mode='whole')
    assert size_of(whole) == (512, 704)
    whole.model.test_cfg = dict(mode='slide', crop_size=(512, 640), stride=(341, 341))
    assert size_of(whole) == (512, 640)


def test_last_resize_counts():
    assert size_of(config(resize((1333, 800)), resize((64, 32), False))) == (32, 64)


@pytest.mark.parametrize('pipeline', [
    [], [dict(type='RandomResize', scale=(1333, 800))], [dict(type='Resize', scale_factor=0.5)],
    [dict(type='Pad', size_divisor=32)], [dict(type='ResizeToMultiple')], [dict(scale=(64, 64))]])
def test_config_that_does_not_resize(pipeline):
    found = find(config(*pipeline))
    assert found.size is None
    assert str(found) == ('the size of test images was not found (the test pipeline does not '
                          'resize to a size); set calibration.image_size=(H, W)')


@pytest.mark.parametrize('steps, expected, said', [
    ([resize((800, 1333), kind='FixScaleResize')], (800, 1067),
     'FixScaleResize(scale=(800, 1333))'),
    ([dict(type='FixShapeResize', width=320, height=200)], (200, 320),
     'FixShapeResize(width=320, height=200)'),
    ([dict(type='ResizeShortestEdge', scale=512, max_size=2048)], (512, 683),
     'ResizeShortestEdge(scale=512, max_size=2048)'),
    ([dict(type='ResizeShortestEdge', scale=(512, 640))], (512, 683), None),
    ([dict(type='ResizeShortestEdge', scale=512, max_size=600)], (450, 600), None),
    ([dict(type='RandomChoiceResize', scales=[(640, 640), (320, 320), (480, 480)])], (480, 480),
     None),
    ([dict(type='RandomChoiceResize', scales=[(1333, 800)], keep_ratio=True)], (800, 1067), None),
    ([resize((640, 640)), dict(type='Pad', size=(704, 672))], (672, 704), 'Pad(size=(704, 672))'),
    ([dict(type='Pad', size=(64, 32))], (32, 64), None),
    ([resize((80, 60)), dict(type='Pad', pad_to_square=True)], (80, 80),
     "Resize(scale=(80, 60)), then Pad()"),
    ([resize((80, 60)), dict(type='Pad', size_divisor=32)], (64, 96), None),
    ([resize((80, 60)), dict(type='ResizeToMultiple', size_divisor=32)], (64, 96), None),
    ([resize((80, 60)), dict(type='ResizeToMultiple')], (64, 96), None),
    ([resize((256, 256)), dict(type='CenterCrop', crop_size=224)], (224, 224), None),
    ([resize((80, 60)), dict(type='CenterCrop', crop_size=(70, 64))], (60, 70), None),
    ([resize((80, 60)), dict(type='CenterCrop', crop_size=(70, 64), auto_pad=True)], (64, 70),
     None),
    ([resize((80, 60)), dict(type='Resize', scale_factor=0.5)], (30, 40), None),
    ([resize((80, 60)), dict(type='Resize', scale_factor=(2.0, 0.5))], (30, 160),
     'Resize(scale=(80, 60)), then Resize(scale_factor=(2.0, 0.5))')])
def test_other_steps(steps, expected, said):
    found = find(config(*steps))
    assert found.size == expected
    if said is not None:
        assert str(found) == f"{expected[0]}x{expected[1]}, from test_dataloader's {said}"


def test_several_datasets():
    several = config(resize((1333, 800)))
    one = several.test_dataloader.dataset
    other = config(resize((64, 64))).test_dataloader.dataset
    several.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[one, other])
    assert size_of(several) == (800, 1067)
    # What the wrapper does comes after.
    several.test_dataloader.dataset.pipeline = [dict(type='CenterCrop', crop_size=512)]
    assert size_of(several) == (512, 512)
    several.test_dataloader.dataset = dict(type='RepeatDataset',
                                           dataset=several.test_dataloader.dataset)
    assert size_of(several) == (512, 512)


SIDES = [(480, 640), (640, 480), (333, 500), (500, 401), (500, 400)]


@pytest.mark.parametrize('steps, preprocessor, expected, said', [
    ([], None, (500, 480), 'the median of the images in {}'),
    ([], PAD, (512, 480), 'the median of the images in {}'),
    ([dict(type='Resize', scale_factor=0.5)], None, (250, 240),
     'the median of the images in {}, then Resize(scale_factor=0.5)'),
    ([dict(type='Pad', size_divisor=64)], None, (512, 512), None),
    ([resize((64, 64))], None, (64, 64), "test_dataloader's Resize(scale=(64, 64))")])
def test_median_of_the_annotations(tmp_path, steps, preprocessor, expected, said):
    chosen = config(*steps, preprocessor=preprocessor)
    chosen.test_dataloader.dataset.update(data_root=str(tmp_path), ann_file='val.json')
    if 'Resize(scale=(' not in str(said):
        missing = find(chosen)
        assert missing.size is None and f'{tmp_path / "val.json"} is not there' in str(missing)
    (tmp_path / 'val.json').write_text(json.dumps(dict(
        images=[dict(height=height, width=width) for height, width in SIDES])))
    found = find(chosen)
    assert found.size == expected
    if said is not None:
        assert found.source == said.format(tmp_path / 'val.json')


@pytest.mark.parametrize('text', ['{', '[]', '{"images": []}', '{"images": [{"height": 3}]}',
                                  '{"images": [{"height": "a", "width": "b"}]}', '{"images": 3}'])
def test_annotations_that_hold_no_sizes(tmp_path, text):
    chosen = config()
    (tmp_path / 'val.json').write_text(text)
    chosen.test_dataloader.dataset.ann_file = str(tmp_path / 'val.json')
    found = find(chosen)
    assert found.size is None and 'holds no heights and widths' in found.source


def test_size_of_the_preprocessor():
    """A fixed size that mmseg pads test images to; without one, and nothing else that
    says it, the crop that it was trained on."""
    assert find(config(preprocessor=dict(size=(256, 512)))) == \
        ((256, 512), 'model.data_preprocessor.size')
    padded = dict(size=(256, 256), test_cfg=dict(size=(640, 640)))
    assert find(config(preprocessor=padded)) == \
        ((640, 640), 'model.data_preprocessor.test_cfg.size')
    assert size_of(config(resize((700, 500), False), preprocessor=padded)) == (640, 700)


def test_classifiers():
    """timm's size for the model, as ``psaq_mm.ImageFolder`` resizes."""
    dataset = dict(type='psaq_mm.ImageFolder', root='nowhere',
                   model='swin_base_patch4_window12_384')
    chosen = Config(dict(model=dict(type='X'), test_dataloader=dict(dataset=dataset)))
    assert find(chosen) == ((384, 384),
                                   "timm's settings for swin_base_patch4_window12_384")
    dataset['transform'] = dict(crop_pct=1.0)
    assert size_of(Config(dict(model={}, test_dataloader=dict(dataset=dataset)))) == (384, 384)
    dataset['transform'] = dict(input_size=(3, 112, 96))
    assert size_of(Config(dict(model={}, test_dataloader=dict(dataset=dataset)))) == (112, 96)
    dataset.update(transform=None, model='swin_base_patch4_window12_384.no_such_tag')
    found = find(Config(dict(model={}, test_dataloader=dict(dataset=dataset))))
    assert found.size is None and 'swin_base_patch4_window12_384.no_such_tag' in found.source


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_configs_of_the_hosts(package):
    """The size is found in the host's configs with a Swin backbone that can be read."""
    root = Path(pytest.importorskip(package).__file__).parent / '.mim' / 'configs'
    paths = [path for path in sorted(root.rglob('*swin*.py')) if '_base_' not in str(path)]
    found = 0
    for path in paths[::1 if package == 'mmseg' else 4]:  # all take 10 seconds
        try:
            chosen = Config.fromfile(path)
        except Exception:  # some import what is not installed
            continue
        backbone = (chosen.get('model') or {}).get('backbone') or {}
        kind = backbone.get('type')
        if (kind.__name__ if isinstance(kind, type) else str(kind)).endswith('SwinTransformer'):
            found += 1
            assert find(chosen).size is not None, path
    assert found > 10


@pytest.mark.parametrize('loader', [
    None, {}, dict(dataset=None), dict(dataset=dict(type='ImageFolder', root='x')),
    dict(dataset=dict(pipeline=None))])
def test_config_without_a_pipeline(loader):
    assert size_of(Config(dict(model=dict(type='X'), test_dataloader=loader))) is None
    assert size_of(Config(dict(model=dict(type='X')))) is None


@pytest.mark.parametrize('path, expected', [
    ('configs/mask_rcnn_swin_t_w8a8.py', (800, 1088)),
    ('configs/cascade_mask_rcnn_swin_b_w8a8.py', (800, 1088)),
    ('configs/retinanet_swin_t_w8a8.py', (800, 1088)),
    ('configs/upernet_swin_t_w8a8.py', (512, 683)),
    ('configs/swin_t_w8a8.py', (224, 224)),
    ('demo/swin_demo_w8a8.py', (112, 112))])
def test_shipped_configs(path, expected):
    assert size_of(load_config(ROOT / path)) == expected


def test_demo():
    assert size_of(load_config(DEMO / 'mask_rcnn_swin_demo_w8a8.py')) == (224, 224)

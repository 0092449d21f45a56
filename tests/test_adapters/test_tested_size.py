# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The size that a config tests at."""
import pytest
from conftest import DEMO, ROOT
from mmengine.config import Config

from psaq_mm.engine import load_config
from psaq_mm.adapters.tested_size import test_size as size_of  # pytest collects what is called test_


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
    [dict(type='Pad', size=(64, 64))], [dict(scale=(64, 64))]])
def test_config_that_does_not_resize(pipeline):
    assert size_of(config(*pipeline)) is None


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
    ('configs/swin_t_w8a8.py', None)])
def test_shipped_configs(path, expected):
    assert size_of(load_config(ROOT / path)) == expected


def test_demo():
    assert size_of(load_config(DEMO / 'mask_rcnn_swin_demo_w8a8.py')) == (224, 224)

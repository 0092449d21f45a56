# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Models that the hosts' own functions take, quantized or not."""
import mmdet.apis
import mmseg.apis
import numpy as np
import pytest
import torch
from conftest import DEMO
from mmengine.config import Config

import psaq_mm
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.engine.dataset_meta import inference_config, read_dataset_meta
from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops

SHAPES = ('disc', 'square', 'triangle', 'star', 'ring', 'cross')


def assert_same_instances(first, second):
    first, second = first.pred_instances, second.pred_instances
    assert len(first) > 2 and first.scores[0] > 0.9
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.bboxes, second.bboxes)
    assert torch.equal(first.masks, second.masks)


def test_detector_is_that_of_mmdet(demo_config, demo_checkpoint, photos):
    image = str(photos / '0.png')
    theirs = mmdet.apis.init_detector(str(demo_config), str(demo_checkpoint), device='cpu')
    ours = psaq_mm.init_model(demo_config, demo_checkpoint)
    assert not ours.training and ours.dataset_meta['classes'] == SHAPES
    assert_same_instances(mmdet.apis.inference_detector(ours, image),
                          mmdet.apis.inference_detector(theirs, image))


def test_segmentor_is_that_of_mmseg(photos):
    image = str(photos / '0.png')
    files = [str(DEMO / f'upernet_swin_demo{suffix}') for suffix in ('.py', '.pth')]
    theirs = mmseg.apis.init_model(*files, device='cpu')
    ours = psaq_mm.init_model(*files)
    assert ours.dataset_meta['classes'] == tuple(theirs.dataset_meta['classes'])
    assert [list(c) for c in ours.dataset_meta['palette']] == theirs.dataset_meta['palette']
    found, expected = (mmseg.apis.inference_model(model, image).pred_sem_seg.data
                       for model in (ours, theirs))
    assert len(found.unique()) > 2 and torch.equal(found, expected)


def test_quantized_detector(quantization_config, quantized_demo, demo_checkpoint, photos):
    """Its predictions are those of psaq_mm.load, and not those of the float model."""
    image = str(photos / '0.png')
    model = psaq_mm.init_model(quantization_config, quantized_demo)
    assert not model.training and next(named_quant_ops(model), None) is not None
    assert model.dataset_meta['classes'] == SHAPES
    other = psaq_mm.init_model(quantization_config, demo_checkpoint)
    floating = mmdet.apis.inference_detector(other, image)
    quantized = mmdet.apis.inference_detector(model, image)
    assert not torch.equal(floating.pred_instances.scores[:3], quantized.pred_instances.scores[:3])
    psaq_mm.load(other, quantized_demo)
    assert_same_instances(quantized, mmdet.apis.inference_detector(other, image))


@pytest.mark.parametrize('name, inferencer', [
    ('mask_rcnn_swin_demo', mmdet.apis.DetInferencer),
    ('upernet_swin_demo', mmseg.apis.MMSegInferencer)])
def test_inferencers(name, inferencer, photos):
    """They take configs, not modules: a config whose model brings its weights."""
    image, config, checkpoint = str(photos / '0.png'), DEMO / f'{name}.py', DEMO / f'{name}.pth'
    ready = psaq_mm.inferencer_config(config, checkpoint)
    found, expected = (
        model(image, return_vis=True) for model in (
            inferencer(ready, device='cpu'),
            inferencer(str(config), str(checkpoint), device='cpu')))
    if name.startswith('upernet'):
        assert np.array_equal(found['predictions'], expected['predictions'])
        assert np.array_equal(found['visualization'], expected['visualization'])
    else:
        assert found['predictions'] == expected['predictions']


def test_quantized_inferencer(quantization_config, quantized_demo, photos):
    ready = psaq_mm.inferencer_config(quantization_config, quantized_demo)
    inferencer = mmdet.apis.DetInferencer(ready, device='cpu')
    assert inferencer.visualizer.dataset_meta['classes'] == SHAPES
    found = inferencer(str(photos / '0.png'))['predictions'][0]
    model = psaq_mm.init_model(quantization_config, quantized_demo)
    expected = mmdet.apis.inference_detector(model, str(photos / '0.png')).pred_instances
    assert found['scores'] == expected.scores.tolist()
    assert found['bboxes'] == expected.bboxes.tolist()


def test_inferencer_takes_no_other_weights(quantization_config, quantized_demo, demo_checkpoint):
    ready = psaq_mm.inferencer_config(quantization_config, quantized_demo)
    with pytest.raises(UserError, match='give no weights beside'):
        mmdet.apis.DetInferencer(ready, weights=str(demo_checkpoint), device='cpu')
    with pytest.raises(UserError, match='nowhere.pth does not exist'):
        psaq_mm.inferencer_config(quantization_config, 'nowhere.pth')


def test_a_config_object_stays_as_it_is(demo_config, demo_checkpoint, photos):
    config = Config.fromfile(demo_config)
    before = config.pretty_text
    model = psaq_mm.init_model(config, demo_checkpoint, cfg_options={
        'model.test_cfg.rcnn.max_per_img': 1})
    found = mmdet.apis.inference_detector(model, str(photos / '0.png'))
    assert len(found.pred_instances) == 1 and config.pretty_text == before


def test_images_need_no_annotations(demo_config):
    config = load_config(demo_config)
    steps = [step['type'] for step in config.test_dataloader.dataset.pipeline]
    ready = inference_config(config)
    kept = [step['type'] for step in ready.test_dataloader.dataset.pipeline]
    assert 'LoadAnnotations' in steps
    assert kept == [step for step in steps if step != 'LoadAnnotations']
    assert [step['type'] for step in ready.test_pipeline] == kept
    wrapped = load_config(demo_config)
    wrapped.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        dict(type='RepeatDataset', times=2, dataset=wrapped.test_dataloader.dataset)])
    assert [step['type'] for step in inference_config(wrapped).test_pipeline] == kept


@pytest.mark.parametrize('meta, classes', [
    (dict(dataset_meta=dict(CLASSES=list('abcdef'))), tuple('abcdef')),
    (dict(CLASSES=('a', 'b', 'c', 'd', 'e', 'f'), PALETTE=None), tuple('abcdef')),
    (dict(dataset_meta=dict(classes=None)), SHAPES),  # those of the config
    (dict(), SHAPES)])
def test_names_of_classes(meta, classes, demo_config):
    config = load_config(demo_config)
    found = read_dataset_meta(config, meta, build_float_model(config))
    assert found['classes'] == classes
    assert len(set(found['palette'])) == 6 and all(
        isinstance(color, tuple) and all(0 <= value <= 255 for value in color)
        for color in found['palette'])


def test_names_that_are_of_another_model(demo_config):
    """The 80 of COCO, which the class of the test set knows, are not the model's 6."""
    config = load_config(demo_config)
    del config.test_dataloader.dataset['metainfo']
    found = read_dataset_meta(config, {}, build_float_model(config))
    assert found['classes'] == tuple(f'class {i}' for i in range(6))


def test_colours(demo_config):
    config = load_config(demo_config)
    model = build_float_model(config)
    stored, own = [[i, 0, 0] for i in range(6)], [[0, i, 0] for i in range(6)]
    meta = dict(dataset_meta=dict(classes=SHAPES, palette=stored))
    assert read_dataset_meta(config, meta, model)['palette'] == [tuple(c) for c in stored]
    config.test_dataloader.dataset.metainfo.palette = own
    assert read_dataset_meta(config, meta, model)['palette'] == [tuple(c) for c in own]


@pytest.mark.parametrize('changes, message', [
    (dict(checkpoint='nowhere.pth'), 'nowhere.pth'),
    (dict(config='nowhere.py'), 'nowhere.py'),
    (dict(device='gpu'), 'gpu'),
    (dict(checkpoint=DEMO / 'upernet_swin_demo.pth'), 'upernet_swin_demo.pth')])
def test_mistakes(changes, message, demo_config, demo_checkpoint):
    given = dict(config=demo_config, checkpoint=demo_checkpoint)
    with pytest.raises(UserError, match=message):
        psaq_mm.init_model(**{**given, **changes})


def test_options_name_keys_that_a_config_object_has(demo_config, demo_checkpoint):
    config = Config.fromfile(str(demo_config))
    with pytest.raises(UserError, match="the config has no key 'modle'. Did you mean 'model'"):
        psaq_mm.init_model(config, demo_checkpoint, cfg_options={'modle.type': 'RetinaNet'})

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Heads that ask for annotations, or for regions of their own, are run as a test runs them."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import plain_student
from mmengine.hub import get_config
from torch import nn

import psaq_mm
from psaq_mm.adapters import find_adapter
from psaq_mm.engine import build_float_model
from psaq_mm.ops import named_quant_ops

CONFIGS = dict(
    sparse='mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    queryinst='mmdet::queryinst/queryinst_r50_fpn_1x_coco.py',
    condinst='mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
    boxinst='mmdet::boxinst/boxinst_r50_fpn_ms-90k_coco.py',
    yolact='mmdet::yolact/yolact_r50_1xb8-55e_coco.py',
    grid='mmdet::grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco.py',
    scnet='mmdet::scnet/scnet_r50_fpn_1x_coco.py')
ON_BOXES = dict(
    panoptic='mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    sabl='mmdet::sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py')
SMALLER = dict(num_convs=1, stacked_convs=1, num_stacked_convs=1, num_stages=2,
               point_feat_channels=4, num_classes=3)


def shrink(part):
    """Narrow the layers of heads, and leave out what is there twice."""
    for key, value in part.items():
        if key in SMALLER:
            part[key] = SMALLER[key]
        elif key.endswith(('_channels', '_channel', '_dims')) and value in (
                128, 256, 1024, 2048):
            part[key] = 32  # as many as there are groups in their norms
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            part[key] = value = list(value)[:2]
            for one in value:
                shrink(one)
        elif isinstance(value, dict):
            shrink(value)


def takes_numpy_sizes():
    try:
        F.interpolate(torch.zeros(1, 1, 2, 2), size=(np.int32(4), np.int32(4)))
    except TypeError:
        return False
    return True


@pytest.fixture(scope='module')
def built():
    models = {}

    def get(name):
        if name == 'boxinst':
            pytest.importorskip('skimage')  # mmdet 3.3 does not bring it
        if name == 'yolact' and not takes_numpy_sizes():
            pytest.skip('mmdet gives torch sizes of numpy here, which this torch does not take')
        if name not in models:
            config = get_config({**CONFIGS, **ON_BOXES}[name])
            levels = (1, 2, 3) if len(config.model.neck.in_channels) == 3 else (0, 1, 2, 3)
            for part in ('neck', 'rpn_head', 'bbox_head', 'roi_head', 'mask_head',
                         'semantic_head'):
                if part in config.model:
                    shrink(config.model[part])
            config.model.neck.in_channels = [12 * 2**level for level in levels]
            config.model.backbone = dict(
                type='SwinTransformer', embed_dims=12, depths=(1, 1, 1, 1), out_indices=levels,
                num_heads=(1, 2, 2, 2))
            if 'roi_head' in config.model and 'stage_loss_weights' in config.model.roi_head:
                config.model.roi_head.stage_loss_weights = [1., 1.]
            torch.manual_seed(0)
            model = build_float_model(config)
            if name in ('sparse', 'queryinst'):  # else boxes of a width below 0
                model.rpn_head.init_weights()
            models[name] = model
        return models[name]

    return get


@pytest.mark.parametrize('name', [*CONFIGS, 'panoptic'])
def test_scope_model(built, name):
    """Every layer that a test runs is quantized and saw values; the others stay float."""
    model = built(name)
    adapter, images = find_adapter(model), torch.randn(2, 3, 64, 160)
    student = plain_student(model, images, scope='model')  # raises where one saw nothing
    ops = {op for op, _ in named_quant_ops(student) if not op.startswith('backbone.')}
    own = {layer for layer, module in model.named_modules() if type(module) in (
        nn.Conv2d, nn.Linear, nn.ConvTranspose2d) and not layer.startswith('backbone.')}
    assert ops >= own - adapter.idle(model)
    assert adapter.predictors(model) and not ops & adapter.idle(model)
    with torch.no_grad():
        adapter.forward(student, images[:1], 'model')  # with other regions, or none


IDLE = dict(yolact={'mask_head.segm_branch.segm_conv'}, condinst=set(), boxinst=set(), grid=set())


@pytest.mark.parametrize('name', IDLE)
def test_what_only_trains(built, name):
    assert find_adapter(built(name)).idle(built(name)) == IDLE[name]


def test_masks_of_early_stages_only_train(built):
    idle = find_adapter(built('queryinst')).idle(built('queryinst'))
    assert {layer.split('.')[2] for layer in idle if '.mask_head.' in layer} == {'0'}


@pytest.mark.parametrize('name', CONFIGS)
def test_taps(built, name):
    """RoI heads that see more than boxes are no taps; the rest can be compared."""
    model = built(name)
    adapter = find_adapter(model)
    groups = adapter.tap_groups(model)
    dense = () if name in ('sparse', 'queryinst') else ('scores', 'deltas')
    assert groups == ('backbone', 'neck', *dense)
    with torch.no_grad():
        taps = adapter.forward_taps(model, torch.randn(1, 3, 64, 160), groups).taps
    assert {tap.partition('.')[0] for tap in taps} == set(groups)


@pytest.mark.parametrize('name, expected', [('panoptic', 3), ('sabl', 3)])
def test_taps_of_regions(built, name, expected):
    """Masks beside boxes, and boxes by two tensors (which side's bucket, and where in it)."""
    adapter, images = find_adapter(built(name)), torch.randn(2, 3, 64, 160)
    with torch.no_grad():
        taps = adapter.forward_taps(built(name), images, ('rois', )).taps
    assert list(taps) == [f'rois.{i}' for i in range(expected)]
    assert all(len(tap) == 2 and tap.isfinite().all() for tap in taps.values())


def test_settings_of_heads_are_restored(built):
    model = built('condinst')
    before = model.bbox_head.test_cfg.score_thr, model.bbox_head.test_cfg.max_per_img
    psaq_mm.prepare(model, psaq_mm.QuantizationSettings(scope='model', channel_limit=None))
    assert (model.bbox_head.test_cfg.score_thr, model.bbox_head.test_cfg.max_per_img) == before


def test_models_asked_by_words_see_one_image_at_a_time(built, monkeypatch):
    """As GLIP asserts where a long list of classes is asked for in parts."""
    model, images, seen = built('yolact'), torch.rand(3, 3, 32, 32), []
    monkeypatch.setattr(model, 'language_model', nn.Identity(), raising=False)
    monkeypatch.setattr(model, 'predict', lambda batch, *args, **kwargs: seen.append(batch))
    find_adapter(model).forward(model, images, 'model')
    assert [len(batch) for batch in seen] == [1, 1, 1] and torch.equal(torch.cat(seen), images)

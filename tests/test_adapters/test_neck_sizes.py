# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Necks whose levels fit each other at some sizes of images only."""
from weakref import WeakKeyDictionary

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope

import psaq_mm
from psaq_mm.adapters import find_adapter, neck_sizes
from psaq_mm.deploy import export_graphs
from psaq_mm.errors import UserError
from psaq_mm.pipeline import Pipeline
from psaq_mm.student.history import history_of

RECIPE = psaq_mm.Recipe.shipped('w8a8').changed(dict(
    synthesis=dict(num_images=1, steps=1),
    quantization=dict(scope='model', channel_limit=None, weight=dict(rounding='nearest'))))


@pytest.fixture(scope='module')
def model():
    """A detector with levels to stride 32, and windows that are full at 48 pixels."""
    torch.manual_seed(0)
    init_default_scope('mmdet')
    model = MODELS.build(ConfigDict(
        type='RetinaNet',
        backbone=dict(type='SwinTransformer', embed_dims=8, depths=(1, 1, 1), num_heads=(1, 1, 1),
                      strides=(4, 2, 2), out_indices=(0, 1, 2), window_size=3),
        neck=[dict(type='FPN', in_channels=[8, 16, 32], out_channels=8, num_outs=4),
              dict(type='CSPNeXtPAFPN', in_channels=[8] * 4, out_channels=8, num_csp_blocks=1)],
        bbox_head=dict(
            type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1,
            anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.],
                                  strides=[4, 8, 16, 32])),
        data_preprocessor=dict(type='DetDataPreprocessor', mean=[0.] * 3, std=[1.] * 3),
        test_cfg=dict(nms_pre=10, min_bbox_size=0, score_thr=0.05, max_per_img=10,
                      nms=dict(type='nms', iou_threshold=0.6))))
    model.eval()
    return model


def test_sizes(model):
    """The neck itself is the reference."""
    adapter = find_adapter(model)
    assert adapter.image_size(model) == (96, 96)
    for size, expected in (((48, 48), (64, 64)), ((32, 96), (32, 96)),
                           ((50, 75), (64, 96)), ((96, 48), (96, 64))):
        assert adapter.taken_size(model, size) == expected
        model(torch.zeros(1, 3, *expected), mode='tensor')
        if size != expected:
            with pytest.raises(RuntimeError):
                model(torch.zeros(1, 3, *size), mode='tensor')


def test_quantized_and_exported(model, tmp_path):
    pipeline = Pipeline(model, RECIPE)
    student = pipeline.run()
    assert pipeline.images.shape[2:] == (96, 96)
    with pytest.raises(UserError, match='--size must be a size .* such as 64; at 48 they'):
        export_graphs(student, tmp_path, 'onnx', [(48, 48)])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('changes, arguments, named', [
    (dict(synthesis=dict(image_size=48)), {}, 'synthesis.image_size .* such as 64; at 48 '),
    (dict(calibration=dict(image_size=(48, 100))), {},
     r'calibration.image_size .* such as \[64, 128\]; at \[48, 100\] '),
    ({}, dict(images=torch.zeros(1, 3, 48, 48)), 'the size of the images .* such as 64; at 48 ')])
def test_given_sizes_are_refused_before_any_step(model, changes, arguments, named):
    with pytest.raises(UserError, match=named):
        psaq_mm.quantize(model, RECIPE.changed(changes), progress=pytest.fail, **arguments)


def test_size_of_test_images_is_padded(model):
    """It is an estimate, or the host pads."""
    seen = []
    student = psaq_mm.quantize(model, RECIPE.changed(dict(synthesis=dict(image_size=64))),
                               test_size=(50, 75), progress=lambda p: seen.append(p.phase))
    assert 'final_ranges' in seen
    assert history_of(student).image_size == (64, 96)


def test_head_that_needs_large_maps(model, monkeypatch):
    """As deformable convolutions do, of 3x3 at least."""
    def forward(features):
        assert min(features[-1].shape[2:]) >= 3
        return features

    monkeypatch.setattr(model.bbox_head, 'forward', forward)
    monkeypatch.setattr(neck_sizes, '_PARTS', WeakKeyDictionary())
    adapter = find_adapter(model)
    assert adapter.taken_size(model, (64, 64)) == (128, 128)
    assert adapter.image_size(model) == (96, 96)


def test_parts_that_run_at_no_size_decide_nothing(model, monkeypatch):
    adapter = find_adapter(model)
    monkeypatch.setattr(neck_sizes, 'parts_that_run', lambda *args: 1)
    assert adapter.image_size(model) == (48, 48)
    assert adapter.taken_size(model, (50, 60)) == (50, 60)


@pytest.mark.parametrize('error', [torch.cuda.OutOfMemoryError, MemoryError])
def test_memory_that_is_short_says_nothing_of_a_size(model, monkeypatch, error):
    def short(features):
        raise error('out of memory')

    monkeypatch.setattr(neck_sizes, '_PARTS', WeakKeyDictionary())
    adapter, forward = find_adapter(model), model.neck.forward
    monkeypatch.setattr(model.neck, 'forward', short)
    with pytest.raises(error, match='out of memory'):
        adapter.taken_size(model, (64, 64))
    monkeypatch.setattr(model.neck, 'forward', forward)
    assert adapter.taken_size(model, (64, 64)) == (64, 64)

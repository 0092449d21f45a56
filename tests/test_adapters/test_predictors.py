# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The last layers of heads are found, whatever their names."""
import copy
import logging

import pytest
import torch
from conftest import DEMO
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from torch import nn

import psaq_mm
from psaq_mm import prepare
from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.predictors import last_layers, layers_of_own_width
from psaq_mm.engine import build_float_model
from psaq_mm.errors import UserError
from psaq_mm.ops import plan_quantization
from psaq_mm.recipe.quantization import QuantizationSettings

SWIN = dict(type='SwinTransformer', _delete_=True, embed_dims=12, depths=(1, 1, 1, 1),
            num_heads=(1, 2, 2, 2))
THREE = dict(SWIN, out_indices=(1, 2, 3))
NECK = dict(in_channels=[24, 48, 96], out_channels=16)
DENSE = dict(backbone=THREE, neck=dict(NECK, start_level=0),
             bbox_head=dict(in_channels=16, feat_channels=16, num_classes=5))
ROI = dict(backbone=SWIN, neck=dict(in_channels=[12, 24, 48, 96], out_channels=16),
           rpn_head=dict(in_channels=16, feat_channels=16))
ROI_LAYERS = dict(bbox_roi_extractor=dict(out_channels=16),
                  mask_roi_extractor=dict(out_channels=16),
                  bbox_head=dict(in_channels=16, fc_out_channels=32),
                  mask_head=dict(in_channels=16, conv_out_channels=16))
LAYERS = dict(num_layers=2, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=32)))
BRANCHES = [f'bbox_head.{kind}_branches.{i}{end}' for kind, end in (('cls', ''), ('reg', '.4'))
            for i in range(3)]
RPN = ['rpn_head.rpn_cls', 'rpn_head.rpn_reg']


def model_of(name, **changes):
    """A small model of a host's config."""
    config = get_config(name)
    config.merge_from_dict(dict(model=copy.deepcopy(changes)))  # merging takes _delete_ out
    return build_float_model(config)


@pytest.mark.parametrize('name, changes, expected', [
    ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', DENSE,
     ['bbox_head.retina_cls', 'bbox_head.retina_reg']),
    ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
     dict(DENSE, bbox_head=dict(DENSE['bbox_head'], norm_cfg=dict(type='GN', num_groups=4))),
     ['bbox_head.conv_centerness', 'bbox_head.conv_cls', 'bbox_head.conv_reg']),
    ('mmdet::atss/atss_r50_fpn_1x_coco.py',
     dict(DENSE, bbox_head=dict(in_channels=32, feat_channels=32, num_classes=5),
          neck=dict(NECK, out_channels=32, start_level=0)),
     ['bbox_head.atss_centerness', 'bbox_head.atss_cls', 'bbox_head.atss_reg']),
    ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
     dict(backbone=THREE, neck=NECK, bbox_head=dict(in_channels=16, feat_channels=16)),
     [f'bbox_head.rtm_{kind}.{i}' for kind in ('cls', 'reg') for i in range(3)]),
    # The last branch scores the encoder's proposals; nothing differentiable follows it.
    ('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
     dict(backbone=THREE, neck=dict(in_channels=[24, 48, 96]), num_queries=20, encoder=LAYERS,
          decoder=LAYERS), BRANCHES),
    ('mmdet::detr/detr_r50_8xb2-150e_coco.py',
     dict(backbone=dict(SWIN, out_indices=(3, )), neck=dict(in_channels=[96]), num_queries=20,
          encoder=LAYERS, decoder=LAYERS), ['bbox_head.fc_cls', 'bbox_head.fc_reg']),
    ('mmdet::ms_rcnn/ms-rcnn_r50_fpn_1x_coco.py',
     dict(ROI, roi_head=dict(ROI_LAYERS, mask_iou_head=dict(
         in_channels=16, conv_out_channels=16, fc_out_channels=32))),
     [*RPN, 'roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg',
      'roi_head.mask_head.conv_logits', 'roi_head.mask_iou_head.fc_mask_iou'])])
def test_families(name, changes, expected):
    model = model_of(name, **changes)
    assert find_adapter(model).predictors(model) == set(expected)


def test_what_a_semantic_branch_hands_on_is_no_output():
    """HTC's embedding of it goes into the RoI heads; its logits go nowhere."""
    model = model_of('mmdet::htc/htc_r50_fpn_1x_coco.py', backbone=SWIN,
                     neck=dict(in_channels=[12, 24, 48, 96]))
    found = find_adapter(model).predictors(model)
    assert 'roi_head.semantic_head.conv_logits' in found
    assert 'roi_head.semantic_head.conv_embedding' not in found
    assert {name.rpartition('.')[2] for name in found} == {
        'rpn_cls', 'rpn_reg', 'fc_cls', 'fc_reg', 'conv_logits'}
    assert len(found) == 2 + 3 * 3 + 1


STAGES = [f'roi_head.bbox_head.{i}.{name}' for i in range(3) for name in ('fc_cls', 'fc_reg')]


@pytest.mark.parametrize('name, expected', [
    ('mask_rcnn', [*RPN, 'roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg',
                   'roi_head.mask_head.conv_logits']),
    ('cascade_mask_rcnn', [*RPN, *STAGES,
                           *(f'roi_head.mask_head.{i}.conv_logits' for i in range(3))]),
    ('upernet', ['decode_head.conv_seg']), ('swin', ['model.head.fc']), ('deit', ['model.head'])])
def test_demo_models(name, expected):
    """They are left as they were, and so are the random numbers."""
    config = Config.fromfile(DEMO / (f'{name}_demo.py' if name in ('swin', 'deit')
                                     else f'{name}_swin_demo.py'))
    model = build_float_model(config)
    model.train()
    model.backbone.eval() if hasattr(model, 'backbone') else None
    some = next(model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    tests = copy.deepcopy(getattr(getattr(model, 'rpn_head', None), 'test_cfg', None))
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert find_adapter(model).predictors(model) == set(expected)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p for p in model.parameters() if not p.requires_grad] == [some]
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert getattr(getattr(model, 'rpn_head', None), 'test_cfg', None) == tests


def test_backbone_alone_has_none():
    model = build_float_model(Config.fromfile(DEMO / 'mask_rcnn_swin_demo.py')).backbone
    assert find_adapter(model).predictors(model) == set()


# The graph


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.unused = (nn.Linear(4, 4) for _ in range(5))
        self.attention = nn.MultiheadAttention(4, 1)
        self.norm = nn.LayerNorm(4)


def found_in(forward, outside=lambda name: False):
    net = Net()
    x = torch.rand(3, 2, 4)
    return last_layers(net, lambda: forward(net, x), outside)


@pytest.mark.parametrize('forward, expected', [
    (lambda net, x: net.b(net.a(x)), {'b'}),
    (lambda net, x: net.b(net.a(x).relu_()), {'b'}),  # in place
    (lambda net, x: net.norm(net.b(x)).sigmoid() * 3, {'b'}),
    (lambda net, x: (net.a(x), dict(two=[net.b(net.c(x))])), {'a', 'b'}),
    (lambda net, x: net.a(x) + net.b(x), {'a', 'b'}),
    # An output and an input at once: an output.
    (lambda net, x: (lambda y: (y, net.b(y)))(net.a(x)), {'a', 'b'}),
    (lambda net, x: net.b(x + net.a(x)), {'b'}),
    # Nothing learns from what is detached: the last of its kind, though no output.
    (lambda net, x: net.b(net.a(x).detach()), {'a', 'b'}),
    # A host copies what it computed, as GLIP does for long lists of classes.
    (lambda net, x: net.b(copy.deepcopy([net.a(x)])[0]), {'b'}),
    (lambda net, x: net.b(net.attention(query=net.a(x), key=net.c(x), value=net.d(x))[0]), {'b'}),
    (lambda net, x: net.attention(x, net.a(x), x)[0], {'attention'}),
    (lambda net, x: net.a(net.a(x)), {'a'}),
    (lambda net, x: None, set())])
def test_graphs(forward, expected):
    assert found_in(forward) == expected


def test_layers_that_are_not_of_a_head():
    """A level of a neck that no head reads is no output; one that is the output is."""
    assert found_in(lambda net, x: (net.a(x), net.b(x))[0], lambda name: name == 'b') == {'a'}
    assert found_in(lambda net, x: net.a(x), lambda name: True) == {'a'}


# What cannot be run


def test_by_widths():
    net = nn.ModuleDict({
        'neck': nn.Conv2d(3, 7, 1), 'x_head': nn.ModuleDict(dict(
            convs=nn.Sequential(nn.Conv2d(7, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)),
            boxes=nn.Conv2d(8, 4, 3), scores=nn.Conv2d(8, 5, 3), norm=nn.BatchNorm2d(8)))})
    assert layers_of_own_width(net, lambda name: name[:6] if 'head' in name else '') == {
        'x_head.boxes', 'x_head.scores'}


def test_a_model_that_cannot_be_run_is_judged_by_widths():
    """As one that asks for texts; a warning says so."""
    config = Config.fromfile(DEMO / 'mask_rcnn_swin_demo.py')
    model = build_float_model(config)
    expected = find_adapter(model).predictors(model)
    model = build_float_model(config)

    def fail(*args, **kwargs):
        raise KeyError('text_prompts')

    model.forward = model.predict = fail
    lines = []
    logger = MMLogger.get_instance('test_predictors')
    logger.handle, before = lines.append, logger.handle
    try:
        assert find_adapter(model).predictors(model) == expected
    finally:
        logger.handle = before
    assert [line.levelno for line in lines] == [logging.WARNING]
    assert "(KeyError: 'text_prompts'): those whose output is as wide as no input of their head " \
        'are taken' in lines[0].getMessage()


def test_a_model_that_cannot_be_run_is_refused():
    """Before any work; its backbone can be quantized."""
    model = build_float_model(Config.fromfile(DEMO / 'mask_rcnn_swin_demo.py'))

    def fail(*args, **kwargs):
        raise KeyError('text_prompts')

    model.predict = fail
    settings = psaq_mm.QuantizationSettings(scope='model')
    with pytest.raises(UserError, match="cannot be run on an image alone .KeyError: 'text_prompts'"
                       ".; quantize its backbone"):
        psaq_mm.quantize(model, psaq_mm.Recipe(quantization=settings))
    psaq_mm.prepare(model, psaq_mm.QuantizationSettings(channel_limit=None))


def test_preparation_says_which():
    model = build_float_model(Config.fromfile(DEMO / 'upernet_swin_demo.py'))
    logger = MMLogger.get_instance('test_predictors_plan')
    lines = []
    logger.handle, before = lambda record: lines.append(record.getMessage()), logger.handle
    try:
        for scope in ('backbone', 'model'):
            prepare(model, QuantizationSettings.from_dict(dict(
                scope=scope, channel_limit=None)))
    finally:
        logger.handle = before
    assert [line for line in lines if 'output' in line] == [
        'layers whose output is that of the model, quantized by predictor_bits: '
        'decode_head.conv_seg']


def test_segmentors_are_a_kind():
    """Every layer of one, so that a base may treat segmentors otherwise."""
    for name, expected in (('upernet', True), ('mask_rcnn', False)):
        model = build_float_model(Config.fromfile(DEMO / f'{name}_swin_demo.py'))
        settings = QuantizationSettings.from_dict(dict(
            overrides={'@segmentor': dict(attention=dict(bits=5))}))
        plan = plan_quantization(model, settings, find_adapter(model))
        assert {specs['attention'].bits for specs in plan.values() if 'attention' in specs} \
            == {5 if expected else 8}

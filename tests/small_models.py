# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Small models that several tests need, and what must not change in a model."""
from contextlib import contextmanager

import torch
from conftest import DEMO
from mmdet.models.backbones.swin import SwinTransformer
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from psaq_mm.adapters import find_adapter

#: What a config changes of the demo's Mask R-CNN for a backbone of four blocks, width 16.
SMALL = dict(
    backbone=dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=16),
                  mask_roi_extractor=dict(out_channels=16),
                  bbox_head=dict(in_channels=16, fc_out_channels=32),
                  mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1)),
    test_cfg=dict(rpn=dict(max_per_img=20)))


def swin(**changes):
    """A backbone of four blocks with random weights, in evaluation mode."""
    model = SwinTransformer(**{**dict(embed_dims=16, depths=(2, 2), num_heads=(1, 2),
                                      strides=(4, 2), out_indices=(0, 1)), **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval()
    return model


def partly_trained():
    """A backbone as in training, with some of it frozen and some in evaluation mode."""
    model = swin(drop_path_rate=0.5)
    model.train()
    model.stages[0].eval()
    model.patch_embed.projection.weight.requires_grad_(False)
    model.stages[1].blocks[0].with_cp = True
    return model


def detector():
    """The demo's Mask R-CNN, but for :data:`SMALL`, with random weights."""
    init_default_scope('mmdet')
    config = Config.fromfile(str(DEMO / 'mask_rcnn_swin_demo.py'))
    config.merge_from_dict(dict(model=SMALL))
    model = MODELS.build(config.model)
    model.eval()
    return model


def widen(model, factor=16.):
    """Make a channel of each norm ``factor`` times as wide, and compute the same."""
    with torch.no_grad():
        for norm, reader in find_adapter(model).norm_readers(model).items():
            norm, reader = model.get_submodule(norm), model.get_submodule(reader)
            norm.weight[3] *= factor
            norm.bias[3] *= factor
            reader.weight[:, 3] /= factor
    return model


def state_of(model):
    """A copy of the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, before):
    """The state dict is what :func:`state_of` gave, bit by bit."""
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@contextmanager
def left_as_it_was(model):
    """Modes, gradients, weights, classes, attributes and hooks are the same after the block."""
    modes = {m: m.training for m in model.modules()}
    gradients = {p: p.requires_grad for p in model.parameters()}
    classes = {name: type(m) for name, m in model.named_modules()}
    attributes = {m: set(m.__dict__) for m in model.modules()}
    state = state_of(model)
    yield
    assert {m: m.training for m in model.modules()} == modes
    assert {p: p.requires_grad for p in model.parameters()} == gradients
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert {m: set(m.__dict__) for m in model.modules()} == attributes
    assert_state(model, state)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks
    assert all(p.grad is None for p in model.parameters())


def raw_outputs(model, images):
    """Outputs of all heads on the model's own proposals, before any threshold."""
    found = []
    handles = [module.register_forward_hook(lambda _, __, out: found.append(out))
               for module in (model.backbone, model.neck, model.rpn_head,
                              model.roi_head.bbox_head, model.roi_head.mask_head)]
    with torch.no_grad():
        find_adapter(model).forward_model(model, images)
    for handle in handles:
        handle.remove()
    return list(_tensors_in(found))


def _tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)

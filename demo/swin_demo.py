# A small Swin classifier of timm for the objects in the scenes of demo/scenes.py:
# 112x112, six classes. `demo/train.py` trains it with exactly these settings.
_base_ = '../configs/_base_/imagenet_classification.py'
data_root = '{{ fileDirname }}/data/'
name = 'swin_tiny_patch4_window7_224'
model = dict(
    type='psaq_mm.TimmClassifier', name=name, img_size=112, embed_dim=24, depths=(2, 2, 4),
    num_heads=(1, 2, 4), num_classes=6, drop_path_rate=0.05)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='psaq_mm.ImageFolder', root=data_root + 'train_crops', model=name, training=True,
        transform=dict(input_size=(3, 112, 112), scale=(0.7, 1.0), vflip=0.5, color_jitter=0.,
                       interpolation='bilinear')))
val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='psaq_mm.ImageFolder', root=data_root + 'val_crops', model=name,
        transform=dict(input_size=(3, 112, 112), crop_pct=1.0)))
test_dataloader = dict(_delete_=True, **val_dataloader)
val_evaluator = dict(type='psaq_mm.TopKAccuracy', topk=(1, 5))
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=5.0))
max_iters = 3000
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=200, end=max_iters, eta_min=0.),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict()
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=250, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)

# Evaluation of a timm classifier on ImageNet: the validation set in folders by
# WordNet id, data/imagenet/val/n01440764/ILSVRC2012_val_00000293.JPEG and so on.
default_scope = 'mmengine'

test_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(type='DefaultSampler', shuffle=False),
    # `model`, set where the model is, is the timm model to resize and crop for.
    dataset=dict(type='psaq_mm.ImageFolder', root='data/imagenet/val'))
test_evaluator = dict(type='psaq_mm.TopKAccuracy', topk=(1, 5))
test_cfg = dict()

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1),
    sampler_seed=dict(type='DistSamplerSeedHook'))
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
log_level = 'INFO'

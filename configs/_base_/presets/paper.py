# As PSAQ-ViT V1's released code places quantizers and makes images, with V2's
# changes: no labels, and the teacher-student game, whose rules V2's abstract does
# not give (docs/method.md). Naive ranges, no BatchNorm prior.
_base_ = './default.py'
quantization = dict(
    placement='v1', channel_limit=None, patch_embed_bits=None, predictor_bits=None,
    weight=dict(observer=dict(_delete_=True, type='MinMaxObserver'), rounding='nearest'),
    activation=dict(observer=dict(_delete_=True, type='MinMaxObserver'), margin=0.0),
    roles=dict(_delete_=True), overrides=dict(_delete_=True))
synthesis = dict(
    num_images=32,
    batch_size=32,
    steps=500,
    priors=dict(
        patch_similarity=dict(form='v1', points=10),
        total_variation=dict(weight=0.05)))
evolution = dict(
    rounds=10,
    sample_steps=50,
    student_steps=100,
    batch_size=32,
    losses=dict(_delete_=True),
    zoom=1.0,
    contrast=1.0,
    weight_lr=0.01,
    range_lr=1e-3)

# What we would use, by what docs/results.md measured: images by the prior, ranges set on
# them, weights rounded by GPTQ.
quantization = dict(
    placement='operands',  # inputs of Linear, Conv2d and both attention matmuls
    scope='backbone',  # or 'model': neck and heads too
    include=['*'],
    exclude=[],
    channel_limit=1.5,  # after LayerNorm, of the median channel; the rest moves into weights
    patch_embed_bits=8,  # whatever the rest has; None: as the rest
    predictor_bits=8,  # of the last layers, such as fc_reg; the same
    weight=dict(
        bits=8, symmetric=True, granularity='per_channel',
        observer=dict(type='MinMaxObserver'),
        rounding='gptq'),  # of what the student does not learn; else 'nearest'
    activation=dict(
        bits=8, symmetric=False, granularity='per_tensor',
        observer=dict(type='MinMaxObserver'),
        margin=2.0),  # room for what synthetic images do not show: 3x at 8 bits, 1.5x at 6
    roles=dict(
        attention=dict(  # softmax output: most of it is near 0, and it cannot leave [0, 1]
            observer=dict(type='MSEObserver', min_factor=0.02, candidates=100),
            margin=4.0, bounds=(0.0, 1.0)),
        input=dict(  # after LayerNorm and GELU, where a few channels are far out
            observer=dict(type='PercentileObserver', percentile=0.999))),
    overrides={
        # averages over tokens, images, and inputs of layers that keep 8 bits: nothing to clip
        '*attn*.proj': dict(input=dict(observer=dict(type='MinMaxObserver'))),
        '@patch_embed': dict(input=dict(observer=dict(type='MinMaxObserver'))),
        # Few regions hold objects, and synthetic images fewer than photographs: what they show
        # needs room, and room needs bits. Inputs of RoI heads keep 8; weights are as the rest.
        '@roi_head': dict(input=dict(
            bits=8, margin=2.0, observer=dict(type='PercentileObserver', percentile=0.9995))),
        '@predictor': dict(input=dict(observer=dict(type='MinMaxObserver')))})

synthesis = dict(
    num_images=8,
    batch_size=8,
    image_size=224,  # multiples of 224 leave Swin's windows without padding
    steps=50,  # in each phase; twice as many earned no accuracy
    shifts=(15, 30),  # one phase for each: largest random roll, pixels per 224
    lr=0.25,
    betas=(0.5, 0.9),
    warmup=0.2,
    flip=0.5,
    priors=dict(
        patch_similarity=dict(type='PatchSimilarityPrior', weight=1.0, form='binned', bins=256),
        total_variation=dict(type='TotalVariationPrior', weight=0.025)),
    save_interval=50)

evolution = dict(
    rounds=0,  # no game: beyond GPTQ it earned no accuracy on our models; 5 in 'evolve'
    sample_steps=0,  # images that compete earned nothing that we could measure; try 5
    student_steps=20,
    batch_size=4,
    taps=dict(backbone=1.0, neck=1.0, scores=1.0, deltas=1.0, logits=1.0, rois=0.0),
    losses=dict(scores='binary_kl'),  # of the rest, relative_l1
    adversarial_weight=1.0,
    adversarial_fraction=0.3,
    sample_lr=0.05,
    buffer_size=32,
    new_fraction=0.5,
    zoom=3.0,  # the student learns from parts of images, magnified by up to this,
    contrast=0.2,  # and of less contrast, down to this
    learn='both',
    weight_lr=0.01,  # of the step between two integers, so that it fits all widths
    range_lr=1e-3,  # relative to the scale; 5e-3 clips what synthetic images do not show
    patience=3,
    save_interval=100)

calibration = dict(batch_size=8, image_size='test')

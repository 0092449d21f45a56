# A small DeiT of timm for the same crops as swin_demo.py: 196 patches of 8x8 and a
# class token. `demo/train.py` trains it with exactly these settings.
_base_ = './swin_demo.py'
model = dict(
    _delete_=True, type='psaq_mm.TimmClassifier', name='deit_tiny_patch16_224', img_size=112,
    patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=6, drop_path_rate=0.05)
max_iters = 3000
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=200, end=max_iters, eta_min=0.),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)

# Swin-S on ImageNet, in float.
_base_ = './_base_/imagenet_classification.py'
model = dict(type='psaq_mm.TimmClassifier', name='swin_small_patch4_window7_224')
test_dataloader = dict(dataset=dict(model='swin_small_patch4_window7_224'))

# DeiT-T on ImageNet, in float.
_base_ = './_base_/imagenet_classification.py'
model = dict(type='psaq_mm.TimmClassifier', name='deit_tiny_patch16_224')
test_dataloader = dict(dataset=dict(model='deit_tiny_patch16_224'))

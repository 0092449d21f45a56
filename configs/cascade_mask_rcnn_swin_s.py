_base_ = './cascade_mask_rcnn_swin_t.py'
model = dict(backbone=dict(depths=[2, 2, 18, 2]))

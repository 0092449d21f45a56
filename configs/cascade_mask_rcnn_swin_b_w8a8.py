_base_ = ['./cascade_mask_rcnn_swin_b.py', './_base_/w8a8.py']

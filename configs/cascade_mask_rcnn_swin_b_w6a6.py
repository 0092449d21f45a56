_base_ = ['./cascade_mask_rcnn_swin_b.py', './_base_/w6a6.py']

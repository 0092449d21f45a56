_base_ = ['./cascade_mask_rcnn_swin_s.py', './_base_/w4a4.py']

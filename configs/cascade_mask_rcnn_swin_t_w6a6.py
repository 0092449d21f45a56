_base_ = ['./cascade_mask_rcnn_swin_t.py', './_base_/w6a6.py']

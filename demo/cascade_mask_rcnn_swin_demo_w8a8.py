# The demo cascade at 8 bits, with our default settings.
_base_ = ['./cascade_mask_rcnn_swin_demo.py', '../configs/_base_/w8a8.py']

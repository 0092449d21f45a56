# What `make demo` runs: the demo detector at 8 bits, with our default settings.
_base_ = ['./mask_rcnn_swin_demo.py', '../configs/_base_/w8a8.py']

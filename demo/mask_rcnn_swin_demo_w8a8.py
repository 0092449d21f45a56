# What `make demo` runs: the demo detector at 8 bits, with fewer steps than the
# default so that it ends within minutes on a laptop's CPU.
_base_ = ['./mask_rcnn_swin_demo.py', '../configs/_base_/w8a8.py']

# The demo's Swin classifier at 8 bits, with our default settings.
_base_ = ['./swin_demo.py', '../configs/_base_/w8a8.py']
synthesis = dict(image_size=112)

# The demo segmentor at 8 bits, with our default settings.
_base_ = ['./upernet_swin_demo.py', '../configs/_base_/w8a8.py']

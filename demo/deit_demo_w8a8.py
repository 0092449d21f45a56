# The demo's DeiT at 8 bits, with our default settings; lr as V1 for DeiT [v1].
_base_ = ['./deit_demo.py', '../configs/_base_/w8a8.py']
synthesis = dict(image_size=112, lr=0.20)

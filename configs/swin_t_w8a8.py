_base_ = ['./swin_t.py', './_base_/w8a8.py']

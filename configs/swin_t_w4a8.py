_base_ = ['./swin_t.py', './_base_/w4a8.py']

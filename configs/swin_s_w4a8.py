_base_ = ['./swin_s.py', './_base_/w4a8.py']

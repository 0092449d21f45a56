_base_ = ['./swin_s.py', './_base_/w8a8.py']

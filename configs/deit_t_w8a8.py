_base_ = ['./deit_t.py', './_base_/w8a8.py']
synthesis = dict(lr=0.20)  # as V1 for DeiT [v1]

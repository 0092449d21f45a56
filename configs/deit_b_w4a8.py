_base_ = ['./deit_b.py', './_base_/w4a8.py']
synthesis = dict(lr=0.20)  # as V1 for DeiT [v1]

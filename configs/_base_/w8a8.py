# Weights in 8 bits, activations in 8; the patch embedding in 8.
_base_ = './data_free.py'
recipe = 'w8a8'

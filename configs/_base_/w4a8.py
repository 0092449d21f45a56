# Weights in 4 bits, activations in 8; the patch embedding in 8.
_base_ = './data_free.py'
recipe = 'w4a8'

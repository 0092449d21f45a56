# Weights in 4 bits, activations in 4; the patch embedding in 8.
_base_ = './data_free.py'
recipe = 'w4a4'

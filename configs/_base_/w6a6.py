# Weights in 6 bits, activations in 6; the patch embedding in 8.
_base_ = './data_free.py'
recipe = 'w6a6'

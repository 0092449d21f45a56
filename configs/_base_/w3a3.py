# Weights in 3 bits, activations in 3; the patch embedding in 8.
_base_ = './data_free.py'
recipe = 'w3a3'

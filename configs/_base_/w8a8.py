# Weights in 8 bits, activations in 8; the patch embedding in 8.
_base_ = './data_free.py'
quantization = dict(weight=dict(bits=8), activation=dict(bits=8))

# Weights in 8 bits, activations in 8 with a zero point of 0, as TensorRT wants them.
_base_ = './w8a8.py'
quantization = dict(activation=dict(symmetric=True))

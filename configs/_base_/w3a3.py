# Weights in 3 bits, activations in 3; the patch embedding in 8. With 8 integers a range
# that holds all but 0.1 % of the inputs is still too wide: it holds 99 %. Softmax outputs are
# to show even attention too, not large weights alone: by the absolute error.
_base_ = './w4a4.py'
quantization = dict(
    weight=dict(bits=3),
    activation=dict(bits=3),
    roles=dict(
        attention=dict(observer=dict(type='MAEObserver', min_factor=0.02, candidates=100)),
        input=dict(observer=dict(type='PercentileObserver', percentile=0.99))))

# Weights in 4 bits, activations in 4; the patch embedding in 8. Steps of 4 bits are
# too coarse to give some away, so there is no room beyond what synthetic images show.
_base_ = './data_free.py'
quantization = dict(
    weight=dict(bits=4),
    activation=dict(bits=4, margin=0.0),
    roles=dict(attention=dict(margin=0.0)))

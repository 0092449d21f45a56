# As w4a4.py, for segmentors: softmax outputs are to show even attention too, not large
# weights alone. What decides that is docs/results.md; detectors lose a little by it.
_base_ = './w4a4.py'
quantization = dict(roles=dict(attention=dict(
    observer=dict(type='MAEObserver', min_factor=0.02, candidates=100))))

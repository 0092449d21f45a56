# The paper's setting as far as it is known: see presets/paper.py.
_base_ = './w8a8.py'
preset = 'paper'

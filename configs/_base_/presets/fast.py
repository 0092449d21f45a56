# As the default, in half the time: half of the prior's steps.
_base_ = './default.py'
synthesis = dict(steps=25)

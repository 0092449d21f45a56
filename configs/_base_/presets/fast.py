# The prior alone: images from the teacher, ranges set on them, no student steps.
_base_ = './default.py'
evolution = dict(rounds=0)

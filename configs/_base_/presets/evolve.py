# As the default, with twice the prior's steps, and then the student learns from views of the
# images. Feature maps come closer to the float model's; on photographs, and in 3 bits, accuracy
# may be lost.
_base_ = './default.py'
synthesis = dict(steps=100)
evolution = dict(rounds=5)

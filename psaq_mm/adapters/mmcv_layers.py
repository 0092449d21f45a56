# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""mmcv's own layers, which differ from torch's on empty input only."""
from mmcv.cnn.bricks.wrappers import Conv2d, ConvTranspose2d, Linear

from psaq_mm.ops import QuantConv2d, QuantConvTranspose2d, QuantLinear, register_op

register_op(Linear)(QuantLinear)
register_op(Conv2d)(QuantConv2d)
register_op(ConvTranspose2d)(QuantConvTranspose2d)

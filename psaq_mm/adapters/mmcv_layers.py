# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""mmcv's own Linear and Conv2d, which differ from torch's on empty input only."""
from mmcv.cnn.bricks.wrappers import Conv2d as MMCV_CONV2D
from mmcv.cnn.bricks.wrappers import Linear as MMCV_LINEAR

from psaq_mm.ops import QuantConv2d, QuantLinear, register_op

register_op(MMCV_LINEAR)(QuantLinear)
register_op(MMCV_CONV2D)(QuantConv2d)

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized ``nn.Conv2d``."""
from torch import Tensor, nn

from .op import QuantOp, register_op


@register_op(nn.Conv2d)
class QuantConv2d(QuantOp, nn.Conv2d):
    """Convolution with quantized weight (out, in, kh, kw), input and output
    (B, C, H, W)."""

    roles = dict(weight=0, input=1, output=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantize('input', x)
        return self.quantize('output', self._conv_forward(x, self.quantized_weight(), self.bias))

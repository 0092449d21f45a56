# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized ``nn.Linear``."""
import torch.nn.functional as F
from torch import Tensor, nn

from .op import QuantOp, register_op


@register_op(nn.Linear)
class QuantLinear(QuantOp, nn.Linear):
    """Linear layer with quantized weight (out, in), input and output (..., C)."""

    roles = dict(weight=0, input=-1, output=-1)

    def weight_rows(self, weight: Tensor) -> Tensor:
        return weight

    def input_rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.in_features)

    def weight_of_rows(self, rows: Tensor) -> Tensor:
        return rows

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantize('input', x)
        return self.quantize('output', F.linear(x, self.quantized_weight(), self.bias))

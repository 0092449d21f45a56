# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized ``nn.Conv2d`` and ``nn.ConvTranspose2d``."""
from typing import List, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from .op import QuantOp, register_op


@register_op(nn.Conv2d)
class QuantConv2d(QuantOp, nn.Conv2d):
    """Convolution with quantized weight (out, in, kh, kw), input and output
    (B, C, H, W)."""

    roles = dict(weight=0, input=1, output=1)

    def weight_rows(self, weight: Tensor) -> Optional[Tensor]:
        return weight.flatten(1) if self.groups == 1 else None

    def input_rows(self, x: Tensor) -> Tensor:
        mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
        padded = F.pad(x, self._reversed_padding_repeated_twice, mode)
        patches = F.unfold(padded, self.kernel_size, self.dilation, stride=self.stride)
        return patches.transpose(1, 2).flatten(0, 1)

    def weight_of_rows(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantize('input', x)
        return self.quantize('output', self._conv_forward(x, self.quantized_weight(), self.bias))


@register_op(nn.ConvTranspose2d)
class QuantConvTranspose2d(QuantOp, nn.ConvTranspose2d):
    """Transposed convolution with quantized weight (in, out / groups, kh, kw),
    input and output (B, C, H, W).

    The channel axis of the weight is 1: the output's, as int8 kernels and
    QuantizeLinear want it. With groups, the channels that stand at the same
    place of their groups share a range.
    """

    roles = dict(weight=1, input=1, output=1)

    def weight_rows(self, weight: Tensor) -> Optional[Tensor]:
        # Where outputs of two pixels do not overlap: a row for each place of the kernel.
        apart = self.stride == self.kernel_size and self.groups == 1 and not any(self.padding) \
            and set(self.dilation) == {1}
        return weight.flatten(1).T if apart else None

    def input_rows(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).flatten(0, -2)

    def weight_of_rows(self, rows: Tensor) -> Tensor:
        return rows.T.reshape(self.weight.shape)

    def forward(self, x: Tensor, output_size: Optional[List[int]] = None) -> Tensor:
        x = self.quantize('input', x)
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size,  # type: ignore[arg-type]
            2, self.dilation)  # type: ignore[arg-type]
        out = F.conv_transpose2d(
            x, self.quantized_weight(), self.bias, self.stride,
            self.padding, padding, self.groups, self.dilation)  # type: ignore[arg-type]
        return self.quantize('output', out)

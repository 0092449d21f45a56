# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A quantized convolution as a product of two matrices of integers.

onnxruntime multiplies integers in a convolution only where the output is
quantized too, which the checkpoint's arithmetic does not do, and computes it in
float otherwise. Its products of matrices have integer operands and a float
result. So the integers of a patch are put side by side, channels last.
"""
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.ops import QuantConv2d, QuantOp

from .activation_form import ActivationForm

FEWEST_CHANNELS = 16
"""With fewer, such as those of an image, a patch is too short to be copied, and
the convolution too small to matter."""


def is_matrix_product(op: QuantOp) -> bool:
    """Whether an op is a convolution that can be written so, its input's
    quantizer being in the form that is traced."""
    return (isinstance(op, QuantConv2d) and 'input' in op.quantizers
            and isinstance(op.quantizers['input'], ActivationForm)
            and op.groups == 1 and op.in_channels >= FEWEST_CHANNELS
            and op.padding_mode == 'zeros' and not isinstance(op.padding, str))


def matrix_product_forward(op: Any) -> Callable[[Tensor], Tensor]:
    """The forward of a convolution as a product of matrices.

    Args:
        op (QuantConv2d): Of which :func:`is_matrix_product` is true; its weight
            in the form of a matrix (kh * kw * in, out).

    Returns:
        Callable: Maps (B, C, H, W) to what the convolution gives.
    """
    quantizer = op.quantizers['input']

    def forward(x: Tensor) -> Tensor:
        integers = quantizer.to_integers(x).permute(0, 2, 3, 1)
        patches = _patches(integers, op, int(quantizer.zero_point))
        out = torch.matmul(quantizer.to_real(patches), op.quantizers['weight']())
        if op.bias is not None:
            out = out + op.bias.view(1, 1, 1, -1)
        return op.quantize('output', out.permute(0, 3, 1, 2))

    return forward


def _patches(x: Tensor, op: Any, zero_point: int) -> Tensor:
    """The channels of all places under the kernel side by side.

    Args:
        x (Tensor): Integers, shape (B, H, W, C).
        op (QuantConv2d): Kernel, stride, padding and dilation.
        zero_point (int): The integer of padding.

    Returns:
        Tensor: Shape (B, h, w, kh * kw * C).
    """
    (top, left), (down, right), (rows, cols) = op.padding, op.stride, op.kernel_size
    if top or left:
        x = F.pad(x, [0, 0, left, left, top, top], value=zero_point)
    height, width, channels = x.shape[1:]
    if (rows, cols, down, right) == (1, 1, 1, 1):
        return x
    reach = [(count - 1) * step for count, step in zip(op.kernel_size, op.dilation)]
    h, w = (height - reach[0] - 1) // down + 1, (width - reach[1] - 1) // right + 1
    # One gather: slices that are put together would be copied twice.
    row = (torch.arange(h) * down).view(-1, 1, 1, 1) \
        + (torch.arange(rows) * op.dilation[0]).view(1, 1, -1, 1)
    col = (torch.arange(w) * right).view(1, -1, 1, 1) \
        + (torch.arange(cols) * op.dilation[1]).view(1, 1, 1, -1)
    places = (row * width + col).reshape(-1)
    patches = x.reshape(-1, height * width, channels).index_select(1, places)
    return patches.reshape(-1, h, w, rows * cols * channels)

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A quantized convolution as a matrix product of integers, for onnxruntime.

onnxruntime convolves integers only if the output is quantized too. In our
checkpoints it is not, and onnxruntime would convolve in float. Its matrix
product takes integers and gives floats. So the integers of a patch are laid
side by side, channels last. This is done one row of the output at a time, as
the patches of a whole feature map do not fit a cache.
"""
import copy
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from psaq_mm.ops import QuantConv2d, QuantOp

from .exportable_quantizer import ExportableQuantizer
from .graph_ops import patch_product

FEWEST_CHANNELS = 16
"""Convolutions of fewer channels stay as they are, such as those of an image: a
patch is too short to be worth a copy, and the layer too small to matter."""


def is_matrix_product(op: QuantOp) -> bool:
    """Whether an op is a convolution that can be exported as a matrix product.

    Args:
        op (QuantOp): Its input quantizer is exportable already.
    """
    return (isinstance(op, QuantConv2d) and 'input' in op.quantizers
            and isinstance(op.quantizers['input'], ExportableQuantizer)
            and op.groups == 1 and op.in_channels >= FEWEST_CHANNELS
            and op.padding_mode == 'zeros' and not isinstance(op.padding, str))


def matrix_product_forward(op: Any) -> Callable[[Tensor], Tensor]:
    """Make the forward of a convolution as a matrix product.

    Args:
        op (QuantConv2d): :func:`is_matrix_product` is true of it; its weight
            is stored as a matrix (kh * kw * in, out).

    Returns:
        Callable: Maps (B, C, H, W) to (B, out, h, w), as the convolution does.
    """
    quantizer = op.quantizers['input']

    def forward(x: Tensor) -> Tensor:
        out = _product(quantizer.to_integers(x).permute(0, 2, 3, 1), op)
        factor, shift = op.__dict__.get('batch_norm', (None, op.bias))
        if factor is not None:
            out = out * factor
        if shift is not None:
            out = out + shift.view(1, 1, 1, -1)  # all dimensions: see exportable_ops.product
        return op.quantize('output', out.permute(0, 3, 1, 2))

    return forward


def _product(x: Tensor, op: Any) -> Tensor:
    """Convolve integers, without the bias.

    Args:
        x (Tensor): Integers, shape (B, H, W, C).
        op (QuantConv2d): Its quantizers are exportable.

    Returns:
        Tensor: Shape (B, h, w, out).
    """
    quantizer, weight = op.quantizers['input'], op.quantizers['weight']
    (top, left), (down, right), (rows, cols) = op.padding, op.stride, op.kernel_size
    if top or left:
        x = F.pad(x, [0, 0, left, left, top, top], value=int(quantizer.zero_point))
    if (rows, cols, down, right) == (1, 1, 1, 1):
        return torch.matmul(quantizer.to_real(x), weight())
    height, width, channels = x.shape[1:]
    reach = [(count - 1) * step for count, step in zip(op.kernel_size, op.dilation)]
    h, w = (height - reach[0] - 1) // down + 1, (width - reach[1] - 1) // right + 1
    row = (torch.arange(h) * down).view(-1, 1, 1, 1) \
        + (torch.arange(rows) * op.dilation[0]).view(1, 1, -1, 1)
    col = (torch.arange(w) * right).view(1, -1, 1, 1) \
        + (torch.arange(cols) * op.dilation[1]).view(1, 1, 1, -1)
    places = (row * width + col).flatten(1)
    out: Tensor = patch_product(
        x.reshape(-1, height * width, channels), places, quantizer.scale, quantizer.zero_point,
        weight.integers, weight.scale, weight.zero_point)
    return out


def fold_batch_norms(model: nn.Module) -> None:
    """Fold BatchNorms into the convolutions before them, in place.

    A BatchNorm multiplies each channel by a factor and adds a constant. Done
    within a convolution that is a matrix product, this stays channels last.

    Args:
        model (nn.Module): In evaluation mode.
    """
    for module in list(model.modules()):  # mmcv's ConvModule
        conv: Any = getattr(module, 'conv', None)
        norm = getattr(module, 'norm', None) if getattr(module, 'with_norm', False) else None
        if not isinstance(conv, QuantConv2d) or 'forward' not in conv.__dict__ \
                or 'output' in conv.quantizers or not isinstance(norm, _BatchNorm) \
                or norm.running_mean is None or norm.running_var is None \
                or tuple(module.order)[:2] != ('conv', 'norm'):  # type: ignore[arg-type]
            continue
        with torch.no_grad():
            factor = (norm.running_var + norm.eps).rsqrt()
            factor = factor if norm.weight is None else factor * norm.weight
            shift = -norm.running_mean * factor
            shift = shift if norm.bias is None else shift + norm.bias
            shift = shift if conv.bias is None else shift + conv.bias * factor
        # Into a copy that shares the weights: a convolution may be used with several
        # BatchNorms, as RTMDet's is, which has one for each level.
        conv = copy.copy(conv)
        conv.__dict__['batch_norm'] = (factor, shift)
        conv.__dict__['forward'] = matrix_product_forward(conv)
        module.conv = conv
        setattr(module, str(module.norm_name), nn.Identity())

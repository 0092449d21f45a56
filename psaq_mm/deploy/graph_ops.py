# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Torch operators that are exported as one operator of ONNX or OpenVINO each.

In torch each has the arithmetic of its counterpart. They are registered with
torch's library and not as autograd functions, so that every version of torch
traces each as one node.
"""
from typing import Any, Optional

import torch
import torchvision
from torch import Tensor
from torch.onnx import register_custom_op_symbolic, symbolic_helper

OPSET = 17
"""ONNX operator set of the traced graph: the first with LayerNormalization, and
the last that torch 2.1 can write."""

OPENVINO_DOMAIN = 'org.openvinotoolkit'
"""OpenVINO's reader of ONNX knows the operators of this domain."""

PATCH_DOMAIN = 'psaq_mm'
"""Domain of PatchProduct, which ``onnx_export`` replaces by standard operators."""

_library = torch.library.Library('psaq_mm', 'DEF')
_library.define('quantize_linear(Tensor x, Tensor scale, Tensor zero_point, int axis) -> Tensor')
_library.define('dequantize_linear(Tensor q, Tensor scale, Tensor? zero_point, int axis) '
                '-> Tensor')
_library.define('patch_product(Tensor q, Tensor places, Tensor scale, Tensor zero_point, '
                'Tensor weight, Tensor weight_scale, Tensor? weight_zero_point) -> Tensor')
_library.define('fake_quantize(Tensor x, Tensor low, Tensor high, int levels) -> Tensor')
_library.define('nms(Tensor boxes, Tensor scores, float threshold, int most) -> Tensor')


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Reshape values of shape () or (C, ) to run along an axis of a tensor."""
    if values.dim() == 0:
        return values
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """ONNX's QuantizeLinear to the type of the zero point."""
    info = torch.iinfo(zero_point.dtype)
    q = torch.round(x / _along(scale, x, axis)) + _along(zero_point, x, axis)
    return q.clamp(info.min, info.max).to(zero_point.dtype)


def _dequantize_linear(q: Tensor, scale: Tensor, zero_point: Optional[Tensor],
                       axis: int) -> Tensor:
    """ONNX's DequantizeLinear."""
    values = q.float()
    if zero_point is not None:
        values = values - _along(zero_point, q, axis)
    return values * _along(scale, q, axis)


def _patch_product(q: Tensor, places: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor,
                   weight_scale: Tensor, weight_zero_point: Optional[Tensor]) -> Tensor:
    """A convolution as matrix products, one for each row of the result.

    Args:
        q (Tensor): Integers of a padded feature map, shape (B, H*W, C).
        places (Tensor): Positions in it that the kernel covers, for each row
            of the result, shape (h, w*k).
        scale (Tensor): Scale of ``q``, shape ().
        zero_point (Tensor): Zero point of ``q``, shape ().
        weight (Tensor): Integers, shape (k*C, out).
        weight_scale (Tensor): Scale of the weight, shape () or (out, ).
        weight_zero_point (Tensor, optional): Its zero point, of the same
            shape; None for 0.

    Returns:
        Tensor: Shape (B, h, w, out).
    """
    rows, (length, _) = len(places), weight.shape
    patches = q.index_select(1, places.reshape(-1)).reshape(len(q), rows, -1, length)
    return torch.matmul(_dequantize_linear(patches, scale, zero_point, 1),
                        _dequantize_linear(weight, weight_scale, weight_zero_point, 1))


def _fake_quantize(x: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
    """OpenVINO's FakeQuantize with the same range for input and output."""
    step = (high - low) / (levels - 1)
    q = torch.round((torch.clamp(x, low, high) - low) / step)
    return q * step + low


def _nms(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    """ONNX's NonMaxSuppression of one image and one class: places by falling score."""
    return torchvision.ops.nms(boxes, scores, threshold)[:most]


_library.impl('quantize_linear', _quantize_linear, 'CompositeExplicitAutograd')
_library.impl('dequantize_linear', _dequantize_linear, 'CompositeExplicitAutograd')
_library.impl('patch_product', _patch_product, 'CompositeExplicitAutograd')
_library.impl('fake_quantize', _fake_quantize, 'CompositeExplicitAutograd')
_library.impl('nms', _nms, 'CompositeExplicitAutograd')

quantize_linear: Any = torch.ops.psaq_mm.quantize_linear
dequantize_linear: Any = torch.ops.psaq_mm.dequantize_linear
patch_product: Any = torch.ops.psaq_mm.patch_product
fake_quantize: Any = torch.ops.psaq_mm.fake_quantize
nms: Any = torch.ops.psaq_mm.nms


@symbolic_helper.parse_args('v', 'v', 'v', 'i')
def _export_quantize(g: Any, x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    out = g.op('QuantizeLinear', x, scale, zero_point, axis_i=axis)
    out.setType(x.type().with_dtype(zero_point.type().dtype()))
    return out


@symbolic_helper.parse_args('v', 'v', 'v', 'i')
def _export_dequantize(g: Any, q: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    inputs = [q, scale] if zero_point.node().mustBeNone() else [q, scale, zero_point]
    out = g.op('DequantizeLinear', *inputs, axis_i=axis)
    out.setType(q.type().with_dtype(torch.float32))
    return out


@symbolic_helper.parse_args('v', 'v', 'v', 'v', 'v', 'v', 'v')
def _export_patch_product(g: Any, q: Any, places: Any, scale: Any, zero_point: Any, weight: Any,
                          weight_scale: Any, weight_zero_point: Any) -> Any:
    inputs = [q, places, scale, zero_point, weight, weight_scale]
    if not weight_zero_point.node().mustBeNone():
        inputs.append(weight_zero_point)
    out = g.op(f'{PATCH_DOMAIN}::PatchProduct', *inputs)
    out.setType(q.type().with_dtype(torch.float32).with_sizes([None] * 4))
    return out


@symbolic_helper.parse_args('v', 'v', 'v', 'i')
def _export_fake_quantize(g: Any, x: Any, low: Any, high: Any, levels: int) -> Any:
    out = g.op(f'{OPENVINO_DOMAIN}::FakeQuantize', x, low, high, low, high, levels_i=levels)
    out.setType(x.type())
    return out


@symbolic_helper.parse_args('v', 'v', 'f', 'i')
def _export_nms(g: Any, boxes: Any, scores: Any, threshold: float, most: int) -> Any:
    def constant(values: Any, dtype: torch.dtype = torch.int64) -> Any:
        return g.op('Constant', value_t=torch.tensor(values, dtype=dtype))

    found = g.op('NonMaxSuppression', g.op('Unsqueeze', boxes, constant([0])),
                 g.op('Unsqueeze', scores, constant([0, 1])), constant([most]),
                 constant([threshold], torch.float32))
    out = g.op('Gather', found, constant(2), axis_i=1)  # image, class, place
    out.setType(scores.type().with_dtype(torch.int64).with_sizes([None]))
    return out


register_custom_op_symbolic('psaq_mm::quantize_linear', _export_quantize, OPSET)
register_custom_op_symbolic('psaq_mm::dequantize_linear', _export_dequantize, OPSET)
register_custom_op_symbolic('psaq_mm::patch_product', _export_patch_product, OPSET)
register_custom_op_symbolic('psaq_mm::fake_quantize', _export_fake_quantize, OPSET)
register_custom_op_symbolic('psaq_mm::nms', _export_nms, OPSET)

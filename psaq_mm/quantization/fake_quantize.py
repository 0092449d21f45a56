# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Simulated quantization: round to the integers of a scale, and back to float.

With :math:`q = clamp(round(x / s) + z, q_{min}, q_{max})`, the value is
:math:`(q - z) s`. Rounding is half to even and ``x / s`` is ``x * (1 / s)``,
as in ``torch.fake_quantize_per_tensor_affine``, bit for bit. NaN stays NaN.
"""
from typing import Any, Optional, Tuple

import torch
from torch import Tensor


def _broadcast(values: Tensor, ndim: int, axis: Optional[int]) -> Tensor:
    """View per-channel values of shape (C,) so that they meet ``axis``."""
    if axis is None or values.dim() == 0:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _clamp(q: Tensor, low: Tensor, high: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """``q`` between two tensors, in ``out`` if given."""
    if low.dim() == 0 and low.device.type == 'cpu':
        # Clamping by numbers is 3 times faster on the CPU; on a GPU reading
        # them would wait for the device.
        return torch.clamp(q, low.item(), high.item(), out=out)
    return torch.clamp(q, low, high, out=out)


class _FixedRange(torch.autograd.Function):
    """Straight-through rounding with fixed scale and zero point.

    Saves one byte per element (whether it lies inside the range), not the
    input: the gradient is 1 inside and 0 outside [choice: method of DoReFa
    and of torch's own fake quantize].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        q = torch.mul(x, scale.reciprocal()).round_()
        y = _clamp(q, low, high)
        ctx.save_for_backward(q == y)
        return y.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        inside, = ctx.saved_tensors
        return grad * inside, None, None, None


def _sum_of_products(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """``(a * b).sum_to_size(shape)``, in one pass for a single range."""
    if len(shape) == 0:
        return torch.dot(a.flatten(), b.flatten())
    return (a * b).sum_to_size(shape)


class _LearnedRange(torch.autograd.Function):
    """Straight-through rounding with gradients to scale and zero point.

    With v = x / s, q = round(v) and the ends l = q_min - z and h = q_max - z,
    the gradient to s is q - v inside and l or h outside (LSQ, Esser et al.,
    2020, section 2.1); that to z is 0 inside and -s outside (LSQ+, Bhalgat
    et al., 2020, section 3). With the output y that is (y - x) / s inside and
    y / s outside, so neither q nor v is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int,
                qmax: int) -> Tensor:
        rounded = zero_point.detach().round()
        q = torch.mul(x, scale.reciprocal()).round_()
        y = _clamp(q, qmin - rounded, qmax - rounded)
        inside = q == y
        y.mul_(scale)
        ctx.save_for_backward(x, y, inside, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, y, inside, scale = ctx.saved_tensors
        grad_x = grad * inside
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            outside = grad - grad_x
            if ctx.needs_input_grad[1]:
                grad_scale = (_sum_of_products(grad_x, y - x, scale.shape)
                              + _sum_of_products(outside, y, scale.shape)) / scale
            if ctx.needs_input_grad[2]:
                grad_zero_point = -scale * outside.sum_to_size(scale.shape)
        return grad_x, grad_scale, grad_zero_point, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, integer_range: Tuple[int, int],
                  axis: Optional[int] = None) -> Tensor:
    """Quantize and dequantize, differentiable by the straight-through estimator.

    Gradients: to ``x`` 1 inside the range and 0 outside; to ``scale`` that of
    LSQ (Esser et al., 2020), to ``zero_point`` that of LSQ+ (Bhalgat et al.,
    2020), where they require one.

    Args:
        x (Tensor): Any shape. Half-precision input is quantized in float32
            and returned in its own type.
        scale (Tensor): Shape () or (C,).
        zero_point (Tensor): Integers as float, same shape as ``scale``.
        integer_range (tuple[int, int]): Smallest and largest integer.
        axis (int, optional): Channel axis of ``x`` if ``scale`` is (C,).
            Defaults to None.

    Returns:
        Tensor: Same shape and type as ``x``.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return fake_quantize(x.float(), scale, zero_point, integer_range, axis).to(x.dtype)
    scale = _broadcast(scale, x.dim(), axis)
    zero_point = _broadcast(zero_point, x.dim(), axis)
    qmin, qmax = integer_range
    grad = torch.is_grad_enabled()
    if grad and (scale.requires_grad or zero_point.requires_grad):
        return _LearnedRange.apply(x, scale, zero_point, qmin, qmax)
    # clamp(round(x/s) + z, qmin, qmax) - z  ==  clamp(round(x/s), qmin - z, qmax - z):
    # all are integers below 2^24, hence exact in float32, and two passes fewer.
    low, high = qmin - zero_point.round(), qmax - zero_point.round()
    if grad and x.requires_grad:
        return _FixedRange.apply(x, scale, low, high)
    y = torch.mul(x, scale.reciprocal()).round_()
    return _clamp(y, low, high, out=y).mul_(scale)


def quantize_to_integers(x: Tensor, scale: Tensor, zero_point: Tensor,
                         integer_range: Tuple[int, int],
                         axis: Optional[int] = None) -> Tensor:
    """The integers behind :func:`fake_quantize`, as int32 of ``x``'s shape."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    scale = _broadcast(scale, x.dim(), axis)
    zero_point = _broadcast(zero_point, x.dim(), axis).round()
    q = (x * scale.reciprocal()).round() + zero_point
    return q.clamp(*integer_range).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor,
               axis: Optional[int] = None) -> Tensor:
    """The float32 values of integers: ``(q - zero_point) * scale``."""
    scale = _broadcast(scale, q.dim(), axis)
    zero_point = _broadcast(zero_point, q.dim(), axis).round()
    return (q.float() - zero_point) * scale

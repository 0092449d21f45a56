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


class _FixedRange(torch.autograd.Function):
    """Straight-through rounding with fixed scale and zero point.

    Saves one byte per element (whether it lies inside the range), not the
    input: the gradient is 1 inside and 0 outside [choice: method of DoReFa
    and of torch's own fake quantize].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        y = torch.mul(x, scale.reciprocal()).round_()
        ctx.save_for_backward((y >= low) & (y <= high))
        return y.clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        inside, = ctx.saved_tensors
        return grad * inside, None, None, None


def _round_straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


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
        zero_point = _round_straight_through(zero_point)
        # x / s with a gradient free of 1 / s^2 and of inf - inf, which are not finite for tiny s.
        fixed = scale.detach()
        v = (x * fixed.reciprocal()).clamp(-2.**24, 2.**24) * (fixed / scale)
        q = _round_straight_through(v)
        # Unlike minimum and maximum, clamp does not halve the gradient of values at the ends.
        return torch.clamp(q, qmin - zero_point, qmax - zero_point) * scale
    # clamp(round(x/s) + z, qmin, qmax) - z  ==  clamp(round(x/s), qmin - z, qmax - z):
    # all are integers below 2^24, hence exact in float32, and two passes fewer.
    low, high = qmin - zero_point.round(), qmax - zero_point.round()
    if grad and x.requires_grad:
        return _FixedRange.apply(x, scale, low, high)
    y = torch.mul(x, scale.reciprocal()).round_()
    if low.dim() == 0 and low.device.type == 'cpu':
        # Clamping by numbers is 3 times faster on the CPU; on a GPU reading
        # them would wait for the device.
        y.clamp_(low.item(), high.item())
    else:
        y.clamp_(low, high)
    return y.mul_(scale)


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

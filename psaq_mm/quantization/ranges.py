# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""From the range of a tensor to the scale and zero point of its integers."""
from typing import Tuple

import torch
from torch import Tensor

from .spec import QuantSpec


def flaw_of_range(part: str, value: Tensor, spec: QuantSpec) -> str:
    """What is wrong with a ``scale`` or ``zero_point``; empty if nothing is."""
    low, high = spec.integer_range
    if not value.is_floating_point() or not torch.isfinite(value).all():
        return f'is not finite or holds {value.dtype}'
    if part == 'scale' and not (value > 0).all():
        return 'is not above 0'
    # A learned one lies between integers.
    if part == 'zero_point' and not ((value >= low) & (value <= high)).all():
        return f'is not one of the integers from {low} to {high}'
    return ''


def scale_and_zero_point(lower: Tensor, upper: Tensor, spec: QuantSpec) -> Tuple[Tensor, Tensor]:
    """Scale and zero point that cover a range.

    The range is first widened to hold 0, so that 0 is represented exactly
    (zero padding stays zero) and the zero point fits the integer type, as
    QuantizeLinear demands [choice: V1 does not say]. A range of width 0 gets
    scale 1.

    Args:
        lower (Tensor): Smallest values, shape () or (C,).
        upper (Tensor): Largest values, same shape, not below ``lower``.
        spec (QuantSpec): Bits and symmetry.

    Returns:
        tuple[Tensor, Tensor]: Scale, float32, > 0, and zero point, float32
        holding an integer in the integer range; both of ``lower``'s shape.

    Raises:
        ValueError: If a bound is not finite or ``lower`` exceeds ``upper``.
    """
    if not (torch.isfinite(lower).all() and torch.isfinite(upper).all()):
        raise ValueError('the range of a quantizer must be finite, got '
                         f'[{lower.min().item()}, {upper.max().item()}]')
    if (lower > upper).any():
        raise ValueError('the lower end of a range exceeds its upper end')
    low = lower.detach().double().clamp(max=0.)
    high = upper.detach().double().clamp(min=0.)
    qmin, qmax = spec.integer_range
    if spec.symmetric:
        scale = torch.maximum(-low, high) / qmax
    else:
        scale = (high - low) / (qmax - qmin)
    # Below the smallest normal float32, 1/scale is not finite; such a tensor
    # is zero for all purposes.
    info = torch.finfo(torch.float32)
    scale = torch.where(scale < info.tiny * 4, torch.ones_like(scale), scale)
    scale = scale.clamp(max=info.max / 4).float()
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    zero_point = (qmin - low / scale.double()).round().clamp(qmin, qmax)
    return scale, zero_point.float()

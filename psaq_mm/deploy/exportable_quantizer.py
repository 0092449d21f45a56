# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Exportable counterparts of :class:`~psaq_mm.quantization.Quantizer`.

A quantizer simulates quantization in float. Its counterpart uses operators that
engines know. Scales and zero points are copied: nothing is calibrated here.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp
from psaq_mm.quantization import Quantizer, token_sizes
from psaq_mm.quantization.ranges import flaw_of_range

from .graph_ops import dequantize_linear, fake_quantize, quantize_linear


def check_range(quantizer: Quantizer, where: str) -> None:
    """Raise a :class:`UserError` unless scale and zero point fit the types of ONNX."""
    for part in ('scale', 'zero_point'):
        flaw = flaw_of_range(part, getattr(quantizer, part), quantizer.spec)
        if flaw:
            raise UserError(f'{where}.{part} {flaw}, which no engine accepts; quantize again')


class ExportableQuantizer(nn.Module):
    """The quantizer of an activation as QuantizeLinear and DequantizeLinear.

    Engines saturate at the ends of their 8-bit type. A quantizer with fewer
    integers clips the real values first.

    Args:
        quantizer (Quantizer): A calibrated quantizer of a whole tensor.
        where (str): Its name, for messages.

    Raises:
        UserError: If the range fits no engine, or each channel has its own.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Quantizer, where: str) -> None:
        super().__init__()
        check_range(quantizer, where)
        if quantizer.axis is not None:
            raise UserError(f'{where} is quantized per channel, for which no engine has integer '
                            "kernels; quantize with activation.granularity='per_tensor'")
        spec = quantizer.spec
        self.dtype = torch.int8 if spec.symmetric else torch.uint8
        info = torch.iinfo(self.dtype)
        self.clipped = spec.integer_range != (info.min, info.max)
        scale, zero_point = quantizer.scale.detach(), quantizer.zero_point.detach().round()
        # A quarter beyond the ends, which are rounded to them: OpenVINO brings the limits to the
        # scale of integers and drops what is behind the point, so that 14.9999 became 14.
        first, last = spec.integer_range
        self.low, self.high = (float((end - zero_point) * scale)
                               for end in (first - 0.25, last + 0.25))
        self.register_buffer('scale', scale.clone())
        self.register_buffer('zero_point', zero_point.to(self.dtype))

    def to_integers(self, x: Tensor) -> Tensor:
        """Quantize real values to integers of type :attr:`dtype`."""
        if self.clipped:
            x = torch.clamp(x, self.low, self.high)
        q: Tensor = quantize_linear(x, self.scale, self.zero_point, 1)
        return q

    def to_real(self, q: Tensor) -> Tensor:
        """Convert integers back to real values."""
        x: Tensor = dequantize_linear(q, self.scale, self.zero_point, 1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.to_real(self.to_integers(x))


class ExportableFakeQuantize(ExportableQuantizer):
    """The quantizer of an activation as OpenVINO's FakeQuantize.

    Args:
        quantizer (Quantizer): A calibrated quantizer of a whole tensor.
        where (str): Its name, for messages.
    """

    def __init__(self, quantizer: Quantizer, where: str) -> None:
        super().__init__(quantizer, where)
        first, last = (-127, 127) if self.dtype == torch.int8 else (0, 255)
        self.clipped = quantizer.spec.integer_range != (first, last)
        self.levels = last - first + 1
        zero_point = self.zero_point.float()
        self.register_buffer('first', (first - zero_point) * self.scale)
        self.register_buffer('last', (last - zero_point) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.clipped:
            x = torch.clamp(x, self.low, self.high)
        return fake_quantize(x, self.first, self.last, self.levels)


class ExportableRounding(ExportableQuantizer):
    """The quantizer of an activation as clamp and round in float.

    OpenVINO turns a FakeQuantize into integers and moves the conversion through
    the graph. Around the small products of attention that costs more than the
    integers save [measured]. It fuses a rounding into the layers beside it.

    Args:
        quantizer (Quantizer): A calibrated quantizer of a whole tensor.
        where (str): Its name, for messages.
    """

    def __init__(self, quantizer: Quantizer, where: str) -> None:
        super().__init__(quantizer, where)
        zero_point = float(self.zero_point)
        self.least, self.most = (float(end) - zero_point for end in quantizer.spec.integer_range)
        self.step = float(self.scale)

    def integers(self, x: Tensor, factor: float = 1.) -> Tensor:
        """Quantize ``factor * x`` to integers minus the zero point, as floats.

        Multiplied by :attr:`step` they are the quantized values.
        """
        return torch.clamp(torch.round(x * (factor / self.step)), self.least, self.most)

    def forward(self, x: Tensor) -> Tensor:
        return self.integers(x) * self.step


class ExportableTokens(nn.Module):
    """The quantizer of tokens that have scales of their own: what is quantized is a token over
    its size.

    Args:
        quantizer (nn.Module): The exportable one of what is left, :attr:`rest`.
        softmax (bool): Whether tokens are rows of softmax outputs.
    """

    def __init__(self, quantizer: nn.Module, softmax: bool) -> None:
        super().__init__()
        self.rest, self.softmax = quantizer, softmax

    def split(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Tokens over their sizes, not quantized yet, of shape (..., C), and their sizes, of
        shape (..., 1)."""
        sizes = token_sizes(x, self.softmax)
        return x / sizes, sizes

    def forward(self, x: Tensor) -> Tensor:
        x, sizes = self.split(x)
        values: Tensor = self.rest(x) * sizes
        return values


class ExportableWeight(nn.Module):
    """A quantized weight as stored integers and a DequantizeLinear.

    Args:
        op (QuantOp): An op with a quantized weight.
        where (str): Its name, for messages.
        as_matrix (bool): Whether to store a weight of shape (out, in) or
            (out, in, kh, kw) as (in, out) or (kh * kw * in, out).

    Raises:
        UserError: If the range fits no engine.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Optional[Tensor]

    def __init__(self, op: QuantOp, where: str, as_matrix: bool) -> None:
        super().__init__()
        quantizer = op.weight_quantizer
        assert quantizer is not None
        check_range(quantizer, where)
        spec = quantizer.spec
        self.bits = spec.bits
        self.axis = 0 if quantizer.axis is None else quantizer.axis
        with torch.no_grad():
            integers = quantizer.to_integers(op.weight)
        dtype = torch.int8 if spec.symmetric else torch.uint8
        if as_matrix:
            integers = integers.movedim((0, 1), (-1, -2)).flatten(0, -2)
            self.axis = 1
        self.register_buffer('integers', integers.to(dtype).contiguous())
        self.register_buffer('scale', quantizer.scale.detach().clone())
        self.register_buffer('zero_point', None if spec.symmetric else
                             quantizer.zero_point.detach().round().to(dtype))

    def forward(self) -> Tensor:
        """The weight in real values."""
        return dequantize_linear(self.integers, self.scale, self.zero_point, self.axis)

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""An activation's quantizer in the forms that are traced.

What a quantizer simulates in float becomes operators that engines know. The
numbers are those of the model: nothing is calibrated here.
"""
import torch
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.quantization import Quantizer

from .graph_ops import dequantize_linear, fake_quantize, quantize_linear


def check_range(quantizer: Quantizer, where: str) -> None:
    """Check that integers, scale and zero point fit the types of ONNX.

    Raises:
        UserError: If they do not.
    """
    low, high = quantizer.spec.integer_range
    zero_point = quantizer.zero_point.round()
    if (quantizer.scale <= 0).any():
        raise UserError(f'{where}: a scale is not positive, which no engine takes; quantize again')
    if (zero_point < low).any() or (zero_point > high).any():
        raise UserError(f'{where}: a zero point lies outside of the integers {low} to {high}, '
                        'which no engine takes; quantize again with learnable_ranges=False')


class ActivationForm(nn.Module):
    """One activation's quantizer as QuantizeLinear and DequantizeLinear.

    Engines saturate at the ends of their integer type. Where the quantizer
    has fewer integers, values are clipped first to what these stand for.

    Args:
        quantizer (Quantizer): With one range for the whole tensor.
        where (str): Its name, for messages.

    Raises:
        UserError: If the range fits no engine, or there are several.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Quantizer, where: str) -> None:
        super().__init__()
        check_range(quantizer, where)
        if quantizer.axis is not None:
            raise UserError(f'{where} is quantized per channel, which the integer kernels of no '
                            "engine take; quantize with activation.granularity='per_tensor'")
        spec = quantizer.spec
        self.dtype = torch.int8 if spec.symmetric else torch.uint8
        info = torch.iinfo(self.dtype)
        self.clipped = spec.integer_range != (info.min, info.max)
        scale, zero_point = quantizer.scale.detach(), quantizer.zero_point.detach().round()
        self.low, self.high = (float((end - zero_point) * scale) for end in spec.integer_range)
        self.register_buffer('scale', scale.clone())
        self.register_buffer('zero_point', zero_point.to(self.dtype))

    def to_integers(self, x: Tensor) -> Tensor:
        """The integers, of type :attr:`dtype`."""
        if self.clipped:
            x = torch.clamp(x, self.low, self.high)
        q: Tensor = quantize_linear(x, self.scale, self.zero_point, 1)
        return q

    def to_real(self, q: Tensor) -> Tensor:
        """What integers stand for."""
        x: Tensor = dequantize_linear(q, self.scale, self.zero_point, 1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.to_real(self.to_integers(x))


class FakeQuantizeForm(ActivationForm):
    """The same as OpenVINO's FakeQuantize.

    Args:
        quantizer (Quantizer): With one range for the whole tensor.
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


class RoundForm(ActivationForm):
    """The same as a float that is rounded.

    OpenVINO turns a FakeQuantize into integers, and moves these as far as it
    can. Around the small matmuls of attention that costs more than it saves
    [measured]. A rounding it leaves where it is, in float, within the layers
    before and after it.

    Args:
        quantizer (Quantizer): With one range for the whole tensor.
        where (str): Its name, for messages.
    """

    def __init__(self, quantizer: Quantizer, where: str) -> None:
        super().__init__(quantizer, where)
        zero_point = float(self.zero_point)
        self.least, self.most = (float(end) - zero_point for end in quantizer.spec.integer_range)
        self.step = float(self.scale)

    def integers(self, x: Tensor, factor: float = 1.) -> Tensor:
        """The integers of ``factor * x`` less the zero point, as floats: times
        :attr:`step` they are its quantized values."""
        return torch.clamp(torch.round(x * (factor / self.step)), self.least, self.most)

    def forward(self, x: Tensor) -> Tensor:
        return self.integers(x) * self.step

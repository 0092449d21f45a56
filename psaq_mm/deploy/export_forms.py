# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized ops in the form that is traced: integers, scales, and operators.

What a quantizer simulates in float becomes operators that engines know. The
numbers are those of the model: nothing is calibrated here.
"""
from typing import Any, Collection, Optional

import torch
from torch import Tensor, nn

from psaq_mm.ops import QuantLinear, QuantOp, named_quant_ops
from psaq_mm.quantization import Quantizer

from .activation_form import ActivationForm, FakeQuantizeForm, RoundForm, check_range
from .conv_form import is_matrix_product, matrix_product_forward, take_in_batch_norms
from .graph_ops import dequantize_linear

FORMATS = ('onnx', 'openvino')
"""What can be written."""

ATTENTION_ROLES = ('query', 'key', 'attention', 'value')
"""Operands of the two matmuls of attention."""


class WeightForm(nn.Module):
    """A weight as integers and a DequantizeLinear.

    Args:
        op (QuantOp): With a quantized weight.
        where (str): Its name, for messages.
        as_matrix (bool): Whether a weight (out, in) or (out, in, kh, kw) is
            kept as (in, out) or (kh * kw * in, out).
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
        axis = 0 if quantizer.axis is None else quantizer.axis
        with torch.no_grad():
            integers = quantizer.to_integers(op.weight)
        dtype = torch.int8 if spec.symmetric else torch.uint8
        if as_matrix:
            integers = integers.movedim((0, 1), (-1, -2)).flatten(0, -2)
            axis = 1
        self.axis = axis
        self.register_buffer('integers', integers.to(dtype).contiguous())
        self.register_buffer('scale', quantizer.scale.detach().clone())
        self.register_buffer('zero_point', None if spec.symmetric else
                             quantizer.zero_point.detach().round().to(dtype))

    def forward(self) -> Tensor:
        return dequantize_linear(self.integers, self.scale, self.zero_point, self.axis)


class _Pass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _linear_forward(op: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        x = torch.matmul(op.quantize('input', x), op.quantizers['weight']())
        if op.bias is not None:
            # With all dimensions: onnxruntime would fuse a bias of one dimension into a float
            # Gemm, before it looks for integers.
            x = x + op.bias.view([1] * (x.dim() - 1) + [-1])
        return op.quantize('output', x)

    return forward


def use_export_forms(model: nn.Module, target: str, float_roles: Collection[str] = ()) -> None:
    """Bring all quantized ops of a model into the form that is traced, in place.

    Args:
        model (nn.Module): A copy: it can no longer be trained or saved.
        target (str): One of :data:`FORMATS`.
        float_roles (Collection[str]): Roles whose quantizers are left out.
            Defaults to none.

    Raises:
        UserError: If a range fits no engine.
    """
    for name, op in list(named_quant_ops(model)):
        weight = op.weight_quantizer
        quantized = weight is not None and weight.enabled and 'weight' not in float_roles
        for role, quantizer in list(op.quantizers.items()):
            if role == 'weight':
                continue
            assert isinstance(quantizer, Quantizer)
            form: nn.Module = _Pass()
            if quantizer.enabled and role not in float_roles:
                where = f'{name} ({role})'
                if target == 'onnx':
                    form = ActivationForm(quantizer, where)
                else:
                    form = (RoundForm if role in ATTENTION_ROLES else FakeQuantizeForm)(
                        quantizer, where)
            op.quantizers[role] = form
        if not quantized:
            if weight is not None:
                weight.enabled = False
            continue
        forward = _linear_forward(op) if isinstance(op, QuantLinear) else None
        if target == 'onnx' and is_matrix_product(op):
            forward = matrix_product_forward(op)
        op.quantizers['weight'] = WeightForm(op, f'{name} (weight)', as_matrix=forward is not None)
        # On the instance: what the op's own forward calls, or all of it.
        op.__dict__['quantized_weight'] = op.quantizers['weight'].forward
        if forward is not None:
            op.__dict__['forward'] = forward
    if target == 'onnx':
        take_in_batch_norms(model)


def split_linear(layer: nn.Module, parts: int) -> nn.ModuleList:
    """A linear layer as several, each with its share of the outputs.

    Engines then need not copy the shares apart. Integers, scales and zero
    points of each are those of the whole. The quantizer of the input stays
    behind: the input is quantized once, by :func:`quantize_input`.

    Args:
        layer (nn.Module): An ``nn.Linear``, or its quantized op.
        parts (int): How many; the outputs must divide evenly.

    Returns:
        nn.ModuleList: The layers.
    """
    assert isinstance(layer, nn.Linear)
    size = layer.out_features // parts
    layers = nn.ModuleList()
    for index in range(parts):
        rows = slice(index * size, (index + 1) * size)
        part: nn.Module = nn.Linear(layer.in_features, size, layer.bias is not None)
        with torch.no_grad():
            part.weight.copy_(layer.weight[rows])  # type: ignore[operator]
            if layer.bias is not None:
                part.bias.copy_(layer.bias[rows])  # type: ignore[operator]
        if isinstance(layer, QuantLinear):
            part = _with_quantizers(part, layer, set(layer.quantizers.keys()) - {'input'}, rows)
        layers.append(part)
    return layers


def _with_quantizers(linear: nn.Module, source: QuantOp, roles: Collection[str],
                     rows: slice = slice(None)) -> QuantLinear:
    """A linear layer with quantizers of another op, and their numbers."""
    whole: Any = {role: q for role, q in source.quantizers.items() if role in roles}
    op = QuantLinear.from_float(linear, {role: q.spec for role, q in whole.items()})
    for role, quantizer in whole.items():
        share: Any = op.quantizers[role]
        for key in ('scale', 'zero_point'):
            value = getattr(quantizer, key).detach()
            share._store(key, value if quantizer.axis is None else value[rows])
        share.enabled = quantizer.enabled
    assert isinstance(op, QuantLinear)
    return op


def patches_linear(conv: nn.Module) -> nn.Module:
    """A convolution whose patches do not overlap as a linear layer on them.

    Args:
        conv (nn.Module): An ``nn.Conv2d`` of stride as its kernel and without
            padding, or its quantized op.

    Returns:
        nn.Module: Maps (..., C * kh * kw), the channels first, to (..., out).
    """
    assert isinstance(conv, nn.Conv2d)
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, conv.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        if conv.bias is not None:
            linear.bias.copy_(conv.bias)
    if isinstance(conv, QuantOp):
        return _with_quantizers(linear, conv, ('weight', 'input', 'output'))
    return linear


def quantize_input(layer: Any, x: Tensor) -> Tensor:
    """Quantize the input of a layer, where the layer does."""
    return layer.quantize('input', x) if isinstance(layer, QuantOp) else x

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Make the quantized ops of a model exportable, and split or reshape layers."""
import copy
from functools import partial
from typing import Any, Callable, Collection, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from psaq_mm.ops import QuantLinear, QuantOp, named_quant_ops
from psaq_mm.quantization import Quantizer
from psaq_mm.quantization.spec import PER_TOKEN

from .exportable_conv import fold_batch_norms, is_matrix_product, matrix_product_forward
from .exportable_quantizer import (
    ExportableFakeQuantize,
    ExportableQuantizer,
    ExportableRounding,
    ExportableTokens,
    ExportableWeight,
)

ATTENTION_ROLES = ('query', 'key', 'attention', 'value')
"""Operands of the two matrix products of attention."""


def make_exportable(model: nn.Module, target: str, float_roles: Collection[str] = ()) -> None:
    """Replace the quantizers of a model by exportable ones, in place.

    Args:
        model (nn.Module): A copy in evaluation mode: afterwards it can no
            longer be trained or saved.
        target (str): ``onnx``, ``tensorrt`` or ``openvino``.
        float_roles (Collection[str]): Roles whose quantizers are left out.
            Defaults to none.

    Raises:
        UserError: If a range fits no engine.
    """
    for name, op in list(named_quant_ops(model)):
        for role, quantizer in list(op.quantizers.items()):
            assert isinstance(quantizer, Quantizer)
            if role in float_roles:
                quantizer.enabled = False
            if role == 'weight':
                continue
            exportable: nn.Module = nn.Identity()
            if quantizer.active:
                cls = ExportableQuantizer if target != 'openvino' else \
                    ExportableRounding if role in ATTENTION_ROLES else ExportableFakeQuantize
                exportable = cls(quantizer, f'{name} ({role})')
                if quantizer.spec.granularity == PER_TOKEN:
                    exportable = ExportableTokens(exportable, quantizer.softmax)
            op.quantizers[role] = exportable
        weight = op.weight_quantizer
        if weight is None or not weight.active:
            continue
        forward: Optional[Callable[[Tensor], Tensor]] = None
        if isinstance(op, QuantLinear):
            forward = partial(_linear_forward, op)
        elif target == 'onnx' and is_matrix_product(op):
            forward = matrix_product_forward(op)
        op.quantizers['weight'] = ExportableWeight(op, f'{name} (weight)', forward is not None)
        # Set on the instance: they replace the methods of the class.
        op.__dict__['quantized_weight'] = op.quantizers['weight'].forward
        if forward is not None:
            op.__dict__['forward'] = forward
    if target == 'onnx':
        fold_batch_norms(model)


def _linear_forward(op: Any, x: Tensor) -> Tensor:
    return product(op, *quantize_input(op, x))


def quantize(module: Any, role: str, x: Tensor) -> Tensor:
    """Quantize a tensor by the quantizer that a module has for a role, if any.

    Args:
        module (nn.Module): A quantized op, or a float module.
        role (str): The role of the tensor.
        x (Tensor): Any shape.

    Returns:
        Tensor: The same shape.
    """
    return module.quantize(role, x) if isinstance(module, QuantOp) else x


def quantize_input(layer: Any, x: Tensor, move: Optional[Callable[[Tensor], Tensor]] = None) \
        -> Tuple[Tensor, Optional[Tensor]]:
    """Quantize the input of a linear layer, for :func:`product`.

    Args:
        layer (nn.Module): An ``nn.Linear``, or its quantized op.
        x (Tensor): Tokens, shape (..., C).
        move (Callable, optional): Puts tokens in another order. It moves what is quantized, as
            integers are a quarter of the bytes. What it gives is quantized again, which changes
            nothing: engines look for the integers next to the product. Defaults to None.

    Returns:
        tuple: The tokens; and what the product has to be multiplied by, shape (..., 1), None for
        1. A token's own size commutes with the product. Behind it, it leaves integers to the
        engine.
    """
    if is_rotated(layer):
        x = layer.rotation(x)
    quantizer, x, sizes = without_sizes(quantizer_of(layer, 'input'), x)
    x = quantizer(x)
    if move is not None:
        x, sizes = quantizer(move(x)), None if sizes is None else move(sizes)
    return x, sizes


def quantizer_of(module: Any, role: str) -> nn.Module:
    """The exportable quantizer that a module has for a role; one that does nothing if none."""
    if isinstance(module, QuantOp) and role in module.quantizers:
        return module.quantizers[role]
    return nn.Identity()


def without_sizes(quantizer: nn.Module, x: Tensor) -> Tuple[nn.Module, Tensor, Optional[Tensor]]:
    """Take from tokens the sizes that a quantizer gives each of them, if it does.

    Returns:
        tuple: The quantizer of what is left, that, and the sizes, None for 1.
    """
    if isinstance(quantizer, ExportableTokens):
        return (quantizer.rest, *quantizer.split(x))
    return quantizer, x, None


def product(layer: Any, x: Tensor, sizes: Optional[Tensor]) -> Tensor:
    """A linear layer behind :func:`quantize_input`: product, bias, and the output's quantizer."""
    weight = quantizer_of(layer, 'weight')
    if not isinstance(weight, ExportableWeight):
        x = x if sizes is None else x * sizes
        if not isinstance(layer, QuantLinear):
            return layer(x)
        return layer.quantize('output', F.linear(x, layer.quantized_weight(), layer.bias))
    x = torch.matmul(x, weight())  # it is stored as a matrix (in, out)
    if sizes is not None:
        x = x * sizes
    if layer.bias is not None:
        # The bias gets all dimensions: with one, onnxruntime would fuse it into a float Gemm
        # before it looks for integers.
        x = x + layer.bias.view([1] * (x.dim() - 1) + [-1])
    return layer.quantize('output', x)


def is_rotated(layer: nn.Module) -> bool:
    """Whether a layer, float or quantized, rotates its input."""
    return isinstance(layer, QuantLinear) and layer.rotation is not None


def split_linear(layer: nn.Module, count: int) -> nn.ModuleList:
    """Split a linear layer into several, each with its share of the outputs.

    Engines then need no copies to separate the outputs. Integers, scales and
    zero points stay the same. The new layers do not quantize their input: call
    :func:`quantize_input` once for all of them.

    Args:
        layer (nn.Module): An ``nn.Linear``, or its quantized op.
        count (int): How many layers; must divide the number of outputs.

    Returns:
        nn.ModuleList: The layers.
    """
    assert isinstance(layer, nn.Linear)
    size = layer.out_features // count
    layers = nn.ModuleList()
    for index in range(count):
        rows = slice(index * size, (index + 1) * size)
        share = _linear(layer.weight[rows], None if layer.bias is None else layer.bias[rows])
        layers.append(_copy_quantizers(layer, share, ('weight', 'output'), rows))
    return layers


def linear_of_patches(conv: nn.Module) -> nn.Module:
    """Turn a convolution on patches that do not overlap into a linear layer.

    Args:
        conv (nn.Module): An ``nn.Conv2d`` whose stride is its kernel size,
            without padding, or its quantized op.

    Returns:
        nn.Module: Maps patches (..., C * kh * kw), channels first, to
        (..., out).
    """
    assert isinstance(conv, nn.Conv2d)
    linear = _linear(conv.weight.flatten(1), conv.bias)
    return _copy_quantizers(conv, linear, ('weight', 'input', 'output'))


def _linear(weight: Tensor, bias: Optional[Tensor]) -> Any:
    """A linear layer with copies of the given values."""
    linear: Any = skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def _copy_quantizers(source: nn.Module, linear: nn.Linear, roles: Collection[str],
                     rows: slice = slice(None)) -> nn.Module:
    """Give a linear layer some quantizers of a quantized op: for outputs ``rows``.

    Args:
        source (nn.Module): A quantized op; a float module has no quantizers.
        linear (nn.Linear): The layer.
        roles (Collection[str]): Roles of the quantizers, where there are any.
        rows (slice): Outputs of the op that the layer computes. Defaults to
            all.

    Returns:
        nn.Module: The layer, or its quantized op.
    """
    if not isinstance(source, QuantOp):
        return linear
    op = QuantLinear.from_float(linear, {})
    for role in roles:
        if role in source.quantizers:
            quantizer: Any = copy.deepcopy(source.quantizers[role])
            if quantizer.axis is not None:
                quantizer.restore_range(quantizer.scale[rows], quantizer.zero_point[rows],
                                        quantizer.learned)
            op.quantizers[role] = quantizer
    return op

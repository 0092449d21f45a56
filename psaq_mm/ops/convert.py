# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Put quantized ops into a model, switch them, and take them out again."""
from contextlib import contextmanager
from typing import Iterator, Tuple

from torch import nn

from psaq_mm.quantization import Quantizer

from .op import QuantOp, op_for
from .plan import Plan


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it stands: layers may be shared under two names."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new


def apply_plan(model: nn.Module, plan: Plan, learnable: bool = False) -> None:
    """Replace the planned modules by their quantized ops, in place.

    Quantization is off afterwards, and the model computes what it did.

    Args:
        model (nn.Module): The float model.
        plan (dict): From :func:`plan_quantization`.
        learnable (bool): Whether ranges are parameters. Defaults to False.

    Raises:
        ValueError: If a weight holds NaN or infinite values; it names the
            module. The model is then as it was.
    """
    # Parents first: an op copies its float module's table of children, so a
    # child replaced later is replaced in the op and not in the float parent,
    # and unwrapping the parent restores all of it.
    for name in sorted(plan, key=lambda n: n.count('.')):
        module = model.get_submodule(name)
        op = op_for(module)
        assert op is not None, f'{name}: no op for {type(module).__name__}'
        device = next((p.device for p in module.parameters()), None)
        try:
            _replace(model, module, op.from_float(module, plan[name], learnable).to(device))
        except ValueError as error:
            unwrap(model)
            raise ValueError(f'{name}: {error}') from error


def named_quant_ops(model: nn.Module) -> Iterator[Tuple[str, QuantOp]]:
    """Names and quantized ops of a model, in its own order."""
    for name, module in model.named_modules():
        if isinstance(module, QuantOp):
            yield name, module


def unwrap(model: nn.Module) -> nn.Module:
    """Put the float modules back, in place.

    Args:
        model (nn.Module): A model with quantized ops, or without.

    Returns:
        nn.Module: The same model. Its weights are what they were before
        quantizing, unless they were trained or loaded since.
    """
    ops = dict(named_quant_ops(model))
    for name in sorted(ops, key=lambda n: n.count('.')):
        op, origin = ops[name], ops[name].float_module
        origin.training = op.training
        origin._parameters.update(op._parameters)  # loading may have assigned new ones
        origin._buffers.update(op._buffers)
        if model.get_submodule(name) is op:  # else restored with its parent
            _replace(model, op, origin)
    return model


def set_quantization(model: nn.Module, enabled: bool) -> None:
    """Switch all quantizers of a model on or off."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.enabled = enabled


@contextmanager
def quantization_enabled(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Switch all quantizers within a block, and back after it."""
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    before = [q.enabled for q in quantizers]
    set_quantization(model, enabled)
    try:
        yield
    finally:
        for quantizer, state in zip(quantizers, before):
            quantizer.enabled = state

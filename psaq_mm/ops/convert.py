# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Put quantized ops into a model, switch them, and take them out again."""
from contextlib import contextmanager
from typing import Dict, Iterator, Tuple

from torch import nn

from psaq_mm.quantization import Quantizer, Rotation

from .linear import QuantLinear
from .op import QuantOp, op_for
from .plan import Plan


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it stands: layers may be shared under two names."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Replace the modules of a float model that are planned by their quantized ops, in place.

    The outputs of the model do not change until its quantizers have ranges.
    """
    # Parents first: an op copies its float module's table of children, so a
    # child replaced later is replaced in the op and not in the float parent,
    # and unwrapping the parent restores all of it.
    for name in sorted(plan, key=lambda n: n.count('.')):
        module = model.get_submodule(name)
        op = op_for(module)
        assert op is not None, f'{name}: no op for {type(module).__name__}'
        device = next((p.device for p in module.parameters()), None)
        _replace(model, module, op.from_float(module, plan[name]).to(device))


def named_quant_ops(model: nn.Module) -> Iterator[Tuple[str, QuantOp]]:
    """Names and quantized ops of a model, in its own order."""
    for name, module in model.named_modules():
        if isinstance(module, QuantOp):
            yield name, module


def named_quantizers(model: nn.Module) -> Iterator[Tuple[str, str, Quantizer]]:
    """Name of the module, role and quantizer of all that a model has, in its own order."""
    for name, op in named_quant_ops(model):
        for role, quantizer in op.quantizers.items():
            yield name, role, quantizer


def named_rotations(model: nn.Module) -> Iterator[Tuple[str, Rotation]]:
    """Name of each layer whose input is to be rotated, and its rotation."""
    for name, op in named_quant_ops(model):
        if isinstance(op, QuantLinear) and op.rotation is not None:
            yield name, op.rotation


def ops_to_round(model: nn.Module) -> Dict[str, QuantOp]:
    """Ops of a student whose weight GPTQ is to round and can, by name."""
    return {name: op for name, op in named_quant_ops(model)
            if op.awaits_gptq and op.weight_rows(op.weight) is not None}


def unwrap(model: nn.Module) -> nn.Module:
    """Put the float modules back in the place of quantized ops, in place.

    Args:
        model (nn.Module): A model with quantized ops, or without.

    Returns:
        nn.Module: The same model, in float. Its weights are those of the student: what
        equalization, the game, GPTQ or a quantized checkpoint made of them stays.
    """
    ops = dict(named_quant_ops(model))
    for name in sorted(ops, key=lambda n: n.count('.')):
        op, origin = ops[name], ops[name].float_module
        op.undo_rotation()
        origin.training = op.training
        origin._parameters.update(op._parameters)  # loading may have assigned new ones
        origin._buffers.update(op._buffers)
        if model.get_submodule(name) is op:  # else restored with its parent
            _replace(model, op, origin)
    return model


def set_quantization(model: nn.Module, enabled: bool) -> None:
    """Switch all quantizers of a model off, or on again. It is no part of the state dict:
    prefer :func:`quantization_enabled`, which ends."""
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

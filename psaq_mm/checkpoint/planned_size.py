# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How large the file of a quantized checkpoint will be, before there is one."""
import pickle
from typing import Any, Dict

from torch import nn

from psaq_mm.ops import Plan
from psaq_mm.quantization.packing import packed_bytes
from psaq_mm.quantization.spec import PER_CHANNEL

from .plain import plain

TENSOR_BYTES = 272
"""Of a tensor's entry in the file, beside its values and its name [measured: 268]."""

ROLE_BYTES = 64
"""Of what the manifest tells of a quantized tensor [measured: 50]."""

FILE_BYTES = 8192
"""Of the settings in the manifest and the rest [measured: 5000]."""


def planned_bytes(model: nn.Module, plan: Plan, *notes: Any) -> int:
    """About how large the file of :func:`psaq_mm.save` will be.

    Args:
        model (nn.Module): The float model.
        plan (Plan): Of all its quantized modules.
        *notes (Any): Plain values of any length that the file holds too.

    Returns:
        int: Bytes of the file: packed weights, scales and zero points, what stays float, and what
        a file holds beside tensors, rounded up.
    """
    tensors: Dict[str, int] = {name: value.numel() * value.element_size()
                               for name, value in model.state_dict().items()}
    roles = 0
    for name, specs in plan.items():
        for role, spec in specs.items():
            roles += 1
            module = model.get_submodule(name)
            if role == 'weight':
                weight = module.get_parameter('weight')
                tensors[f'{name}.weight'] = packed_bytes(weight.numel(), spec.bits)
            if spec.rotate and isinstance(module, nn.Linear):
                tensors[f'{name}.rotation.mean'] = 4 * module.in_features
                tensors[f'{name}.bias'] = 4 * module.out_features
            ranges = _most_channels(module, role) if spec.granularity == PER_CHANNEL else 1
            for part in ('scale',) if spec.symmetric else ('scale', 'zero_point'):
                tensors[f'{name}.quantizers.{role}.{part}'] = 4 * ranges
    return FILE_BYTES + ROLE_BYTES * roles + sum(
        TENSOR_BYTES + len(name) + size for name, size in tensors.items()) + sum(
        len(pickle.dumps(plain(note), protocol=2)) for note in notes)


def _most_channels(module: nn.Module, role: str) -> int:
    """Channels of a tensor of a float module, or somewhat more."""
    kinds = ('in_features', 'in_channels') if role == 'input' else (
        'num_heads', 'out_features', 'out_channels')
    for attribute in kinds:
        if hasattr(module, attribute):
            return int(getattr(module, attribute))
    norms = [part.weight.numel() for part in module.modules() if isinstance(part, nn.LayerNorm)]
    return max(norms or [max(parameter.shape[:2]) for parameter in module.parameters()])

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How large the file of a quantized checkpoint will be, before there is one."""
from typing import Dict

from torch import nn

from psaq_mm.ops import Plan
from psaq_mm.quantization.packing import packed_bytes
from psaq_mm.quantization.spec import PER_CHANNEL

TENSOR_BYTES = 272
"""Of a tensor's entry in the file, beside its values and its name [measured: 268]."""

ROLE_BYTES = 64
"""Of what the manifest tells of a quantized tensor [measured: 50]."""

FILE_BYTES = 8192
"""Of the settings in the manifest and the rest [measured: 5000]."""


def planned_bytes(model: nn.Module, plan: Plan) -> int:
    """About how large the file of :func:`psaq_mm.save` will be.

    Args:
        model (nn.Module): The float model.
        plan (Plan): Of all its quantized modules.

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
            ranges = 1
            if role == 'weight':
                weight = model.get_submodule(name).get_parameter('weight')
                tensors[f'{name}.weight'] = packed_bytes(weight.numel(), spec.bits)
                ranges = max(weight.shape[:2]) if spec.granularity == PER_CHANNEL else 1
            for part in ('scale',) if spec.symmetric else ('scale', 'zero_point'):
                tensors[f'{name}.quantizers.{role}.{part}'] = 4 * ranges
    return FILE_BYTES + ROLE_BYTES * roles + sum(
        TENSOR_BYTES + len(name) + size for name, size in tensors.items())

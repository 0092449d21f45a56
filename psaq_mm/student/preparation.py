# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The student: a copy of the float model with quantized ops."""
import copy
from typing import Optional

from mmengine.logging import print_log
from torch import nn

from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import require_finite
from psaq_mm.devices import require_float32
from psaq_mm.errors import UserError
from psaq_mm.ops import apply_plan, plan_quantization, unquantized_weights
from psaq_mm.recipe import QuantizationSettings

from .history import require_equalized, require_float


def prepare(model: nn.Module, settings: Optional[QuantizationSettings] = None) -> nn.Module:
    """Make the student: a copy of a float model with quantized ops.

    It computes what the float model does until :func:`psaq_mm.calibrate` has set ranges.

    Args:
        model (nn.Module): A detector or segmentor with a Swin backbone, a
            Swin or ViT of timm, or the backbone alone. It stays as it is.
        settings (QuantizationSettings, optional): What is quantized, and how.
            Defaults to None: the defaults.

    Returns:
        nn.Module: The student, in evaluation mode.

    Raises:
        UserError: If a weight is not finite or not in float32, the model cannot be quantized
            so, ``channel_limit`` is set and :func:`psaq_mm.equalize` was not called, or bits are
            still to be chosen for a budget.
    """
    settings = settings or QuantizationSettings()
    require_float(model, 'prepare')
    if settings.budget:
        raise UserError(f'psaq_mm.prepare: quantization.{settings.budget} asks for bits to be '
                        'chosen: call psaq_mm.allocate first, and prepare with the settings that '
                        'it gives')
    adapter = find_adapter(model)
    require_float32(model)
    plan = plan_quantization(model, settings, adapter)
    require_equalized(model, settings.channel_limit, 'prepare')
    remaining = unquantized_weights(model, plan, adapter, settings.scope)
    if settings.scope == 'model':
        last = [name for name in plan if name in adapter.predictors(model)]
        print_log('layers whose output is that of the model, quantized by predictor_bits: '
                  f'{", ".join(last) or "none"}', logger='current')
    print_log(f'quantizing {len(plan)} modules in scope {settings.scope!r}; weights left float: '
              f'{", ".join(remaining) or "none"}', logger='current')
    require_finite({f'{name}.weight': model.get_submodule(name).get_parameter('weight')
                    for name, specs in plan.items() if 'weight' in specs}, 'the model')
    student = copy.deepcopy(model)
    apply_plan(student, plan)
    student.eval()
    return student

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Put a model's quantized ops in place."""
from typing import Any

from mmengine.logging import print_log
from torch import nn

from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.adapter import require_float32
from psaq_mm.checkpoint import require_finite
from psaq_mm.ops import apply_plan, left_float, plan_quantization, unwrap
from psaq_mm.recipe.quantization import QuantizationSettings


def quantize(model: nn.Module, **settings: Any) -> nn.Module:
    """Replace modules of a float model by their quantized ops, in place.

    Quantization stays off, and the model computes what it did, until
    :func:`calibrate` has set the ranges of the activations.

    Args:
        model (nn.Module): A detector or segmentor with a Swin backbone, a
            Swin or ViT of timm, or the backbone alone.
        **settings: Of :class:`QuantizationSettings`: ``weight``,
            ``activation``, ``placement``, ``scope``, ``include``, ...
            ``channel_limit`` is :func:`equalize`'s, which comes before.

    Returns:
        nn.Module: The same model.

    Raises:
        UserError: If a setting is wrong, a weight is not finite or in float32, or the
            model cannot be quantized; the model is then unchanged.
    """
    chosen = QuantizationSettings.from_dict(settings)
    adapter = find_adapter(model)
    require_float32(model)
    plan = plan_quantization(model, chosen, adapter)
    remaining = left_float(model, plan, adapter, chosen.scope)
    print_log(f'quantizing {len(plan)} modules in scope {chosen.scope!r}; weights left float: '
              f'{", ".join(remaining) or "none"}', logger='current')
    require_finite({f'{name}.weight': model.get_submodule(name).get_parameter('weight')
                    for name, specs in plan.items() if 'weight' in specs}, 'the model')
    try:
        apply_plan(model, plan, chosen.learnable_ranges)
    except BaseException:
        unwrap(model)
        raise
    return model

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A float model that is easier to quantize, and computes the same."""
from typing import Any, Tuple

from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.adapter import module_device
from psaq_mm.checkpoint import require_finite
from psaq_mm.recipe import CalibrationSettings
from psaq_mm.student import equalize_channels
from psaq_mm.ops import plan_quantization
from psaq_mm.recipe.quantization import QuantizationSettings

from .calibration import observing, require_images


def equalize(model: nn.Module, images: Tensor, batch_size: int = 8, **settings: Any) -> nn.Module:
    """Move the scale of channels that are too wide from LayerNorms into weights, in place.

    To be called on the float model, before the student is made of a copy of it:
    it computes what it did, and stays the student's teacher. As far as
    ``channel_limit`` asks for it, and where what reads a norm will be quantized
    at its input.

    Args:
        model (nn.Module): As of :func:`quantize`.
        images (Tensor): Normalized images of shape (N, C, H, W).
        batch_size (int): Images in a batch. Defaults to 8.
        **settings: Of :class:`QuantizationSettings`, all of them.

    Returns:
        nn.Module: The same model.

    Raises:
        UserError: If a setting is wrong, the model is quantized already or cannot be,
            there are no images, a weight or what a norm gives is not finite, or the model
            computes something else afterwards; it is then unchanged.
    """
    chosen = QuantizationSettings.from_dict(settings)
    adapter = find_adapter(model)
    plan = plan_quantization(model, chosen, adapter)
    CalibrationSettings.from_dict(dict(batch_size=batch_size))
    require_images(images, 'equalization')
    if chosen.channel_limit is None:
        return model
    readers = {norm: reader for norm, reader in adapter.norm_readers(model).items()
               if 'input' in plan.get(reader, {})}
    require_finite({f'{name}.weight': model.get_submodule(name).get_parameter('weight')
                    for pair in readers.items() for name in pair}, 'the model')
    if readers:
        device = module_device(model)

        def feature_maps(batch: Tensor) -> Tuple[Tensor, ...]:
            return adapter.forward_backbone(model, batch.to(device))

        with observing(model, 'equalization'):
            found = equalize_channels(model, readers, images, feature_maps, chosen.channel_limit,
                                      batch_size)
        print_log(f'{sum(found.values())} channels of {sum(map(bool, found.values()))} LayerNorms '
                  f'were more than {chosen.channel_limit:g} times as wide as the median one: '
                  'what is beyond has moved into the weights', logger='current')
    return model

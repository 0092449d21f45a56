# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Move the scale of wide channels from a norm into the weight of the layer that reads it."""
from contextlib import ExitStack
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import require_finite
from psaq_mm.devices import module_device
from psaq_mm.errors import UserError
from psaq_mm.modes import evaluating
from psaq_mm.ops import plan_quantization
from psaq_mm.processes import run_images
from psaq_mm.quantization import excess_width
from psaq_mm.recipe import QuantizationSettings

from .history import note, require_float, require_images

TOLERANCE = 5e-3
"""Largest relative change of feature maps that counts as none [choice]: rounding in
float32 leaves 1e-6, with the shortened products of some GPUs 1e-3."""


def equalize(model: nn.Module, images: Tensor, settings: Optional[QuantizationSettings] = None,
             batch_size: int = 8) -> nn.Module:
    """Rescale wide LayerNorm channels of a float model, in place; its outputs do not change.

    A channel after a LayerNorm that is more than ``channel_limit`` times as wide as the
    median one is divided, and the weight that reads it multiplied. Call it before
    :func:`psaq_mm.prepare`; the model stays the student's teacher.

    Args:
        model (nn.Module): The float model.
        images (Tensor): Normalized images of shape (N, C, H, W).
        settings (QuantizationSettings, optional): What will be quantized: norms are
            rescaled where the input of their reader will be. Defaults to None: the defaults.
        batch_size (int): Images in a batch. Defaults to 8.

    Returns:
        nn.Module: The same model.

    Raises:
        UserError: If ``channel_limit`` is None, the model is quantized already or cannot be,
            there are no images, a weight or what a norm gives is not finite, or the outputs
            change; the model is then as it was.
    """
    settings = settings or QuantizationSettings()
    require_float(model, 'equalize')
    require_images(model, images, 'equalize', batch_size)
    if settings.channel_limit is None:
        raise UserError('psaq_mm.equalize: quantization.channel_limit is None, so there is '
                        'nothing to do; give it a limit such as 1.5, or leave this step out')
    adapter = find_adapter(model)
    plan = plan_quantization(model, settings, adapter)
    readers = {norm: reader for norm, reader in adapter.norm_readers(model).items()
               if 'input' in plan.get(reader, {})}
    require_finite({f'{name}.weight': model.get_submodule(name).get_parameter('weight')
                    for pair in readers.items() for name in pair}, 'the model')
    device = module_device(model)

    def feature_maps(batch: Tensor) -> Tuple[Tensor, ...]:
        return adapter.forward_backbone(model, batch.to(device))

    try:
        with evaluating(model):
            found = equalize_channels(model, readers, images, feature_maps,
                                      settings.channel_limit, batch_size)
    except UserError:  # of another process
        raise
    except ValueError as error:
        raise UserError(f'equalization failed: {error}') from error
    note(model, channel_limit=settings.channel_limit)
    print_log(f'equalization: {sum(found.values())} channels of {sum(map(bool, found.values()))} '
              f'of {len(found)} LayerNorms were more than {settings.channel_limit:g} times as '
              'wide as the median one; what is beyond has moved into the weights',
              logger='current')
    return model


def equalize_channels(model: nn.Module, readers: Dict[str, str], images: Tensor,
                      forward: Callable[[Tensor], Sequence[Tensor]], limit: float,
                      batch_size: int = 8) -> Dict[str, int]:
    """As :func:`equalize`, by any function that gives the feature maps of a batch.

    RepQ-ViT's scale reparameterization (arXiv 2212.08254, section 3.2), of wide channels
    alone, as equal ones make weights harder to quantize, and without its shift: Swin
    pads windows with zeros, and these must stay zeros [choice]. With several processes
    each runs its part of the images, and all rescale alike.

    Args:
        readers (dict[str, str]): Name of each LayerNorm to that of the Linear that
            alone reads its output.
        limit (float): Of :func:`psaq_mm.quantization.excess_width`.

    Returns:
        dict[str, int]: How many channels of each norm were too wide.

    Raises:
        ValueError: If outputs of a norm are not finite; it names the norm. Or if the
            outputs of the model change, as more than its reader reads a norm.
            The model is then as it was.
    """
    norms: Dict[str, Any] = {name: model.get_submodule(name) for name in readers}
    sums = {norm: torch.zeros_like(norm.weight, dtype=torch.float32) for norm in norms.values()}
    counts = {norm: torch.zeros_like(total[0]) for norm, total in sums.items()}

    def add(norm: nn.Module, args: Any, out: Tensor) -> None:
        rows = out.flatten(0, -2).float()
        sums[norm] += rows.square().sum(0)
        counts[norm] += len(rows)

    with ExitStack() as hooks:
        for norm in norms.values():
            hooks.enter_context(norm.register_forward_hook(add))
        run_images(forward, images, batch_size)
    factors = {}
    for name, norm in norms.items():
        all_reduce(sums[norm])
        all_reduce(counts[norm])
        if not torch.isfinite(sums[norm]).all():
            raise ValueError(f'{name}: values are not finite')
        factors[name] = excess_width(sums[norm] / counts[norm].clamp_min(1), limit)
    with torch.no_grad():
        expected = forward(images[:1])
        before: Dict[nn.Parameter, Tensor] = {}
        try:
            _move(model, readers, factors, before)
            error = relative_change(expected, forward(images[:1]))
            # Not `error > limit`, which is False of NaN.
            if not error <= max(TOLERANCE, torch.finfo(expected[0].dtype).eps ** 0.5):
                raise ValueError(f'feature maps changed by {100 * error:.3g} % as the scale of '
                                 'wide channels was moved: something else reads a LayerNorm too; '
                                 'set quantization.channel_limit=None')
        except BaseException:
            for parameter, value in before.items():
                parameter.copy_(value)
            raise
    return {name: int((factor > 1).sum()) for name, factor in factors.items()}


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest ``|b - a| / |b|`` of feature maps, by their L2 norms; NaN if one is."""
    changes = [(b.float() - a.float()).norm() / b.float().norm().clamp_min(1e-12)
               for b, a in zip(before, after)]
    return float(torch.stack(changes).max())  # unlike Python's, torch's max keeps NaN


def _move(model: nn.Module, readers: Dict[str, str], factors: Dict[str, Tensor],
          before: Dict[nn.Parameter, Tensor]) -> None:
    """Move the factors of each norm; ``before`` gets what parameters were."""
    for name, factor in factors.items():
        norm = model.get_submodule(name)
        weight = model.get_submodule(readers[name]).get_parameter('weight')
        own = list(norm.parameters(recurse=False))  # perhaps no bias
        before.update({parameter: parameter.clone() for parameter in (*own, weight)})
        for parameter in own:
            parameter.div_(factor)
        weight.mul_(factor)

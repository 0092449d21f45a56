# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Move the scale of wide channels from a norm into the weight of the layer that reads it."""
from typing import Any, Callable, Dict, Sequence

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from psaq_mm.quantization import excess_width

from .calibration import own_part

TOLERANCE = 5e-3
"""Relative error from which a model no longer computes what it did [choice]: rounding in
float32 leaves 1e-6, with the shortened products of some GPUs 1e-3."""


def equalize_channels(model: nn.Module, readers: Dict[str, str], images: Tensor,
                      forward: Callable[[Tensor], Sequence[Tensor]], limit: float,
                      batch_size: int = 8) -> Dict[str, int]:
    """Divide channels of a LayerNorm that are too wide, and multiply what reads them.

    RepQ-ViT's scale reparameterization (arXiv 2212.08254, section 3.2), of wide channels
    alone, as equal ones make weights harder to quantize, and without its shift: Swin
    pads windows with zeros, and these must stay zeros [choice]. The model computes what it
    did. With several processes each runs its part of the images, and all move alike.

    Args:
        model (nn.Module): A float model; changed in place.
        readers (dict[str, str]): Name of each LayerNorm to that of the Linear that
            alone reads its output.
        images (Tensor): Normalized images of shape (N, C, H, W).
        forward (Callable): Gives the feature maps of a batch of them.
        limit (float): Of :func:`psaq_mm.quantization.excess_width`.
        batch_size (int): Images in a batch. Defaults to 8.

    Returns:
        dict[str, int]: How many channels of each norm were too wide.

    Raises:
        ValueError: If outputs of a norm are not finite; it names the norm. Or if the
            model computes something else afterwards, as more than its reader reads a norm.
            The model is then as it was.
    """
    norms: Dict[str, Any] = {name: model.get_submodule(name) for name in readers}
    sums = {norm: torch.zeros_like(norm.weight, dtype=torch.float32) for norm in norms.values()}
    counts = {norm: torch.zeros_like(total[0]) for norm, total in sums.items()}

    def note(norm: nn.Module, args: Any, out: Tensor) -> None:
        rows = out.flatten(0, -2).float()
        sums[norm] += rows.square().sum(0)
        counts[norm] += len(rows)

    handles = [norm.register_forward_hook(note) for norm in norms.values()]
    try:
        with torch.no_grad():
            for batch in own_part(images).split(batch_size):
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    factors = {}
    for name, norm in norms.items():
        all_reduce(sums[norm])
        all_reduce(counts[norm])
        if not torch.isfinite(sums[norm]).all():
            raise ValueError(f'{name}: values are not finite')
        factors[name] = excess_width(sums[norm] / counts[norm].clamp_min(1), limit)
    with torch.no_grad():
        expected = forward(images[:1])
        before = _move(model, readers, factors)
        found = forward(images[:1])
        error = max(float((a.float() - b).norm() / a.float().norm().clamp_min(1e-12))
                    for a, b in zip(expected, found))
        if error > max(TOLERANCE, torch.finfo(expected[0].dtype).eps ** 0.5):
            for parameter, value in before.items():
                parameter.copy_(value)
            raise ValueError(f'feature maps changed by {100 * error:.3g} % as the scale of wide '
                             'channels was moved: something else reads a LayerNorm too; set '
                             'quantization.channel_limit=None')
    return {name: int((factor > 1).sum()) for name, factor in factors.items()}


def _move(model: nn.Module, readers: Dict[str, str],
          factors: Dict[str, Tensor]) -> Dict[nn.Parameter, Tensor]:
    """Move the factors of each norm; gives what parameters were."""
    before = {}
    for name, factor in factors.items():
        norm = model.get_submodule(name)
        weight = model.get_submodule(readers[name]).get_parameter('weight')
        own = list(norm.parameters(recurse=False))  # perhaps no bias
        before.update({parameter: parameter.clone() for parameter in (*own, weight)})
        for parameter in own:
            parameter.div_(factor)
        weight.mul_(factor)
    return before

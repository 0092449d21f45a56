# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Ranges for the size that a model is tested at."""
from typing import Callable, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.ops import named_quant_ops
from psaq_mm.quantization import Quantizer

from .calibration import calibrate_ranges

Range = Tuple[Tensor, Tensor]


def activation_ranges(model: nn.Module) -> Dict[Quantizer, Range]:
    """The ends of the range of each activation quantizer, shape () or (C,)."""
    return {quantizer: tuple(end.detach().clone() for end in quantizer.range())  # type: ignore
            for _, op in named_quant_ops(model) for role, quantizer in op.quantizers.items()
            if role != 'weight' and isinstance(quantizer, Quantizer)}


def carry_over(learnt: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Scale the end of a learnt range as the rule's end was scaled.

    Args:
        learnt (Tensor): What was learnt at one size.
        before (Tensor): What the rule says at that size, same shape.
        after (Tensor): What the rule says at another size, same shape.

    Returns:
        Tensor: ``learnt * after / before``; where the rule's end is 0 at
        either size or changes its sign, the one farther from 0 of ``learnt``
        and ``after``.
    """
    usable = before * after > 0
    scaled = learnt * after / torch.where(usable, before, torch.ones_like(before))
    farther = torch.where(after.abs() > learnt.abs(), after, learnt)
    return torch.where(usable, scaled, farther)


def as_many_pixels(batch_size: int, images: Tensor, others: Tensor) -> int:
    """How many of ``others``, of another size, make a batch of as many pixels as
    ``batch_size`` of ``images`` do; at least 1."""
    share = others.shape[-2] * others.shape[-1] / (images.shape[-2] * images.shape[-1])
    return max(1, int(batch_size / share))


def carry_ranges_over(model: nn.Module, images: Tensor, others: Tensor,
                      forward: Callable[[Tensor], None], batch_size: int,
                      progress: Optional[Callable[[int], None]] = None) -> None:
    """Bring learnt ranges of activations from one image size to another.

    At another size feature maps are padded otherwise, and padded tokens have
    activations of their own. What was learnt is kept relative to the range
    rule: each end moves by as much as the rule's end moves from ``images`` to
    ``others`` [choice].

    Args:
        model (nn.Module): A student with learnt ranges.
        images (Tensor): Shape (N, C, H, W), of the size that it learnt at.
        others (Tensor): Shape (M, C, H', W'), of the other size.
        forward (Callable): Runs the model on a batch.
        batch_size (int): Images in a batch.
        progress (Callable, optional): Called with the number of images of
            each finished batch, of either size. Defaults to None.
    """
    learnt = activation_ranges(model)
    calibrate_ranges(model, images, forward, batch_size, progress)
    before = activation_ranges(model)
    calibrate_ranges(model, others, forward, as_many_pixels(batch_size, images, others),
                     progress)
    after = activation_ranges(model)
    for quantizer, ends in learnt.items():
        lower, upper = (carry_over(*triple) for triple in
                        zip(ends, before[quantizer], after[quantizer]))
        quantizer.set_range(lower.reshape(-1), upper.reshape(-1))

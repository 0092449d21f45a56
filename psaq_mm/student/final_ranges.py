# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Ranges for the size that a model is tested at."""
from typing import Callable, Dict, Optional, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.ops import named_quantizers
from psaq_mm.processes import count_of_this_process
from psaq_mm.quantization import Quantizer
from psaq_mm.quantization.quantizer import restoring_ranges
from psaq_mm.recipe.checks import check_progress, sides
from psaq_mm.synthesis import mosaic_count, mosaics

from .calibration import calibrate_ranges, forward_of_scope
from .history import note, require_calibrated, require_images


def recalibrate(student: nn.Module, images: Tensor, size: Tuple[int, int], batch_size: int = 8,
                progress: Optional[Callable[[int], None]] = None) -> nn.Module:
    """Set the ranges of activations once more, for images of another size.

    Ranges that were learned are not replaced: each end moves as the range rule's end does
    from the one size to the other.

    Args:
        student (nn.Module): A calibrated student; changed in place.
        images (Tensor): Those that it was calibrated on, shape (N, C, H, W). They become
            mosaics of the other size.
        size (tuple[int, int]): Height and width in pixels.
        batch_size (int): Images of the size of ``images`` in a forward pass; fewer if they
            are larger. Defaults to 8.
        progress (Callable, optional): Called with the number of images of
            each finished batch. Defaults to None.

    Returns:
        nn.Module: The student.

    Raises:
        UserError: As of :func:`psaq_mm.calibrate`.
    """
    require_calibrated(student, 'recalibrate')
    require_images(student, images, 'recalibrate', batch_size)
    check_progress(progress)
    size = sides(size, '(height, width)')
    others = mosaics(images, size)
    learned = has_learned_ranges(student)
    if learned and others is images:
        print_log(f'psaq_mm.recalibrate: ranges were learned at {size[0]}x{size[1]} already, and '
                  'stay as they are', logger='current')
        return student
    with forward_of_scope(student, 'calibration') as forward:
        if learned:
            transfer_learned_ranges(student, images, others, forward, batch_size, progress)
        else:
            calibrate_ranges(student, others, forward,
                             equal_pixel_batch(batch_size, images, others), progress)
    note(student, image_size=size)
    return student


def recalibration_count(student: nn.Module, images: Tensor, size: Tuple[int, int]) -> int:
    """How many images :func:`recalibrate` runs in this process."""
    own = count_of_this_process(len(images)) if has_learned_ranges(student) else 0
    return own + count_of_this_process(mosaic_count(images, size))


def has_learned_ranges(student: nn.Module) -> bool:
    """Whether a range of an activation was learned."""
    return any(quantizer.learned for _, role, quantizer in named_quantizers(student)
               if role != 'weight')


Range = Tuple[Tensor, Tensor]


def activation_ranges(model: nn.Module) -> Dict[Quantizer, Range]:
    """The ends of the range of each activation quantizer, shape () or (C,)."""
    return {quantizer: tuple(end.detach().clone() for end in quantizer.range())  # type: ignore
            for _, role, quantizer in named_quantizers(model) if role != 'weight'}


def transferred_end(learned: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Scale the end of a learned range as the rule's end was scaled.

    Args:
        learned (Tensor): What was learned at one size.
        before (Tensor): What the rule says at that size, same shape.
        after (Tensor): What the rule says at another size, same shape.

    Returns:
        Tensor: ``learned * after / before``; where the rule's end is 0 at
        either size or changes its sign, the one farther from 0 of ``learned``
        and ``after``.
    """
    usable = before * after > 0
    scaled = learned * after / torch.where(usable, before, torch.ones_like(before))
    farther = torch.where(after.abs() > learned.abs(), after, learned)
    return torch.where(usable, scaled, farther)


def equal_pixel_batch(batch_size: int, images: Tensor, others: Tensor) -> int:
    """How many of ``others``, of another size, make a batch of as many pixels as
    ``batch_size`` of ``images`` do; at least 1."""
    share = others.shape[-2] * others.shape[-1] / (images.shape[-2] * images.shape[-1])
    return max(1, int(batch_size / share))


def transfer_learned_ranges(model: nn.Module, images: Tensor, others: Tensor,
                            forward: Callable[[Tensor], None], batch_size: int,
                            progress: Optional[Callable[[int], None]] = None) -> None:
    """:func:`recalibrate` of learned ranges, by any function that runs the model.

    At another size feature maps are padded otherwise, and padded tokens have
    activations of their own. What was learned is kept relative to the range
    rule: each end moves by as much as the rule's end moves from ``images``,
    shape (N, C, H, W), to ``others``, shape (M, C, H', W') [choice].
    """
    learned = activation_ranges(model)
    with restoring_ranges(learned):
        calibrate_ranges(model, images, forward, batch_size, progress)
        before = activation_ranges(model)
        calibrate_ranges(model, others, forward, equal_pixel_batch(batch_size, images, others),
                         progress)
        after = activation_ranges(model)
    for quantizer, ends in learned.items():
        lower, upper = (transferred_end(*triple) for triple in
                        zip(ends, before[quantizer], after[quantizer]))
        quantizer.set_range(lower.reshape(-1), upper.reshape(-1))
        quantizer.learned = True

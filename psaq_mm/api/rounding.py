# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Weights of a student on their integers, by what its layers are given on images."""
from typing import Any, Callable, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.recipe import CalibrationSettings
from psaq_mm.student import as_many_pixels, ops_to_round, round_by_gptq
from psaq_mm.synthesis import mosaics
from psaq_mm.ops import named_quant_ops

from .calibration import observing, require_calibrated, require_images


def round_weights(model: nn.Module, images: Tensor, size: Optional[Tuple[int, int]] = None,
                  teacher: Optional[nn.Module] = None,
                  progress: Optional[Callable[[int], None]] = None, **settings: Any) -> nn.Module:
    """Round the weights that ask for it (``weight=dict(rounding='gptq')``), in place.

    The last step of a quantization: without it, all are rounded to nearest.

    Args:
        model (nn.Module): A calibrated student, with its last ranges.
        images (Tensor): Those it was calibrated or evolved on, shape
            (N, C, H, W).
        size (tuple[int, int], optional): Height and width of test images.
            Defaults to None: that of the images.
        teacher (nn.Module, optional): The float model, if the student has
            learnt: weights that differ from its are left as they learnt to be.
            Defaults to None: all are rounded.
        progress (Callable, optional): Called with the number of images of
            each finished batch. Defaults to None.
        **settings: Of :class:`CalibrationSettings`.

    Returns:
        nn.Module: The same model.

    Raises:
        UserError: If the student is not calibrated, there are no images, the
            teacher is not its float model, or a layer was given values that are
            not finite.
    """
    chosen = CalibrationSettings.from_dict(settings)
    require_calibrated(model)
    require_images(images, 'rounding')
    if teacher is not None:
        _require_float_model_of(model, teacher)
    ops = ops_to_round(model, teacher)
    if not ops:
        return model
    own = images.shape[-2], images.shape[-1]
    others = mosaics(images, size or own)
    with observing(model, 'rounding') as forward:
        round_by_gptq(ops, others, forward, as_many_pixels(chosen.batch_size, images, others),
                      progress)
    return model


def _require_float_model_of(student: nn.Module, teacher: nn.Module) -> None:
    """Raise if a teacher cannot tell which weights of a student learnt."""
    if next(named_quant_ops(teacher), None) is not None:
        raise UserError('the teacher is quantized: pass the float model, which tells what learnt')
    weights = dict(teacher.named_parameters(remove_duplicate=False))
    own = dict(student.named_parameters(remove_duplicate=False))
    may_learn: Set[int] = set()  # by identity: a layer may have two names
    for name, op in named_quant_ops(student):
        if op.weight_quantizer is None:
            continue
        may_learn.update(map(id, op.parameters(recurse=False)))
        weight = weights.get(f'{name}.weight')
        if weight is None or weight.shape != op.weight.shape:
            raise UserError('the teacher is not the float model of the student: it has no '
                            f'{name}.weight of shape {tuple(op.weight.shape)}')
    for name, weight in weights.items():
        # What cannot have learnt and differs is another model's, or of before
        # psaq_mm.equalize, and then all that is quantized would be taken for learnt.
        if name in own and id(own[name]) not in may_learn and not _alike(weight, own[name]):
            raise UserError(f'the teacher is not the float model of the student: {name} differs; '
                            'psaq_mm.equalize comes before the student is made of a copy of it')


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.detach().float().cpu(), other.detach().float().cpu(), rtol=1e-3, atol=1e-6)

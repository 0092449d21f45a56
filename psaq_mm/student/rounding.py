# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Round weights by what their layers are given on images."""
from contextlib import ExitStack
from typing import Any, Callable, Dict, List, Optional

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp, named_quant_ops, ops_to_round
from psaq_mm.processes import run_images
from psaq_mm.quantization import gptq_round
from psaq_mm.quantization.gptq import parts_of, second_moments
from psaq_mm.recipe.checks import check_progress
from psaq_mm.synthesis import mosaics

from .calibration import forward_of_scope
from .final_ranges import equal_pixel_batch
from .history import history_of, require_calibrated, require_images

MAX_ELEMENTS = 2**24
"""Of inputs that are rows at a time, unless one item of a batch has more: 64 MiB."""


def round_weights(student: nn.Module, images: Tensor, batch_size: int = 8,
                  progress: Optional[Callable[[int], None]] = None) -> nn.Module:
    """Round the weights that ask for GPTQ (``weight.rounding='gptq'``), in place.

    The last step: ranges must be final. Weights that were learned in the game keep their
    values, as they were learned under rounding to nearest.

    Args:
        student (nn.Module): A calibrated student.
        images (Tensor): Those that it was calibrated on, shape (N, C, H, W). They become
            mosaics of the size that its ranges were last set at.
        batch_size (int): Images of the size of ``images`` in a forward pass; fewer if they
            are larger. Defaults to 8.
        progress (Callable, optional): Called with the number of images of
            each finished batch. Defaults to None.

    Returns:
        nn.Module: The student.

    Raises:
        UserError: If the student is not calibrated, there are no images, no weight asks for
            it, or a layer was given values that are not finite.
    """
    require_calibrated(student, 'round_weights')
    require_images(student, images, 'round_weights', batch_size)
    check_progress(progress)
    ops = ops_to_round(student)
    # Convolutions with groups, transposed ones whose outputs overlap.
    others_left = [name for name, op in named_quant_ops(student)
                   if op.awaits_gptq and name not in ops]
    if others_left:
        print_log('weights that GPTQ cannot round (no product of a matrix) are rounded to '
                  f'nearest: {", ".join(others_left)}', logger='current')
    if not ops:
        raise UserError('psaq_mm.round_weights: no weight is left to round by GPTQ: all were '
                        "learned or rounded before, or have rounding='nearest'; leave this step "
                        "out, or set quantization.weight.rounding='gptq'")
    size = history_of(student).image_size or (images.shape[-2], images.shape[-1])
    mosaic = mosaics(images, size)
    with forward_of_scope(student, 'rounding') as forward:
        round_by_gptq(ops, mosaic, forward, equal_pixel_batch(batch_size, images, mosaic),
                      progress)
    print_log(f'weights of {len(ops)} modules are rounded by GPTQ', logger='current')
    return student


def round_by_gptq(ops: Dict[str, QuantOp], images: Tensor, forward: Callable[[Tensor], None],
                  batch_size: int = 8, progress: Optional[Callable[[int], None]] = None) -> None:
    """:func:`round_weights` of some ops, by any function that runs their model.

    Inputs are those of the model as it is, its weights rounded to nearest, in one
    pass over the images [choice: GPTQ rounds layer after layer]. With several
    processes each runs its part of the images, and all round alike.

    Raises:
        ValueError: If inputs of a module are not finite; it names the module,
            and no weight is changed.
    """
    moments: Dict[QuantOp, List[Tensor]] = {}
    for op in ops.values():
        rows = op.weight_rows(op.weight)
        assert rows is not None
        moments[op] = [op.weight.new_zeros(size, size, dtype=torch.float32)
                       for size in parts_of(rows.shape[1])]

    def note(op: QuantOp, args: Any) -> None:
        x = op.quantize('input', args[0])
        inputs = sum(len(moment) for moment in moments[op])
        for part in x.split(_items_at_once(x, inputs // x.shape[op.roles['input']])):
            for total, moment in zip(moments[op], second_moments(op.input_rows(part))):
                total += moment

    with ExitStack() as hooks:
        for op in moments:
            hooks.enter_context(op.register_forward_pre_hook(note))
        run_images(forward, images, batch_size, progress)
    rounded = {}
    for name, op in ops.items():
        for moment in moments[op]:
            all_reduce(moment)
        try:
            rounded[op] = _rounded(op, moments.pop(op))
        except ValueError as error:
            raise ValueError(f'{name} (weight): {error}') from error
    with torch.no_grad():
        for op, weight in rounded.items():
            op.weight.copy_(weight)
            op.weight_settled = True


def _items_at_once(x: Tensor, growth: int) -> int:
    """How many items of a batch may become rows at a time, which have ``growth`` times as
    many elements: the patches of a convolution overlap."""
    return max(1, MAX_ELEMENTS * len(x) // max(1, x.numel() * growth))


def _rounded(op: QuantOp, moments: List[Tensor]) -> Tensor:
    """The weight of an op, rounded."""
    quantizer, weight = op.weight_quantizer, op.weight.detach()
    assert quantizer is not None

    def of_rows(values: Tensor) -> Tensor:
        """Of each row of the matrix, from shape () or (C,)."""
        shape = [1] * weight.dim()
        if quantizer.axis is not None:
            shape[quantizer.axis] = -1
        rows = op.weight_rows(values.detach().view(shape).expand_as(weight))
        assert rows is not None
        return rows[:, 0]

    matrix = op.weight_rows(weight)
    assert matrix is not None
    return op.weight_of_rows(gptq_round(matrix, moments, of_rows(quantizer.scale),
                                        of_rows(quantizer.zero_point),
                                        quantizer.spec.integer_range))

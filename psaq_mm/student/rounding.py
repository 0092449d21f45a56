# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Round weights by what their layers are given on images."""
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from psaq_mm.ops import QuantOp, named_quant_ops
from psaq_mm.quantization import gptq_round
from psaq_mm.quantization.gptq import parts_of, second_moments
from psaq_mm.quantization.spec import GPTQ

from .calibration import own_part

MAX_ELEMENTS = 2**24
"""Of inputs that are rows at a time, unless one item of a batch has more: 64 MiB."""


def ops_to_round(model: nn.Module, teacher: Optional[nn.Module] = None) -> Dict[str, QuantOp]:
    """Ops whose weight is to be rounded by GPTQ, by name.

    Args:
        model (nn.Module): A student.
        teacher (nn.Module, optional): Its float model. Weights that differ from
            its are left out: what they learnt, they learnt as they are rounded
            to nearest. Defaults to None: all.

    Returns:
        dict[str, QuantOp]: They; none that is no product of a matrix.
    """
    return {name: op for name, op in _asking(model, teacher)
            if op.weight_rows(op.weight) is not None}


def ops_left_to_nearest(model: nn.Module, teacher: Optional[nn.Module] = None) -> List[str]:
    """Names of ops that GPTQ was asked for and cannot round, as they are no product of a
    matrix: convolutions with groups, transposed ones whose outputs overlap.

    Args:
        model (nn.Module): A student.
        teacher (nn.Module, optional): As of :func:`ops_to_round`.
    """
    return [name for name, op in _asking(model, teacher) if op.weight_rows(op.weight) is None]


def _asking(model: nn.Module, teacher: Optional[nn.Module]) -> Iterator[Tuple[str, QuantOp]]:
    """Ops that GPTQ is asked for and whose weight has not learnt."""
    for name, op in named_quant_ops(model):
        quantizer = op.weight_quantizer
        if quantizer is None or quantizer.spec.rounding != GPTQ:
            continue
        before = None if teacher is None else teacher.get_submodule(name).get_parameter('weight')
        if before is None or torch.equal(before, op.weight):
            yield name, op


def round_by_gptq(ops: Dict[str, QuantOp], images: Tensor, forward: Callable[[Tensor], None],
                  batch_size: int = 8, progress: Optional[Callable[[int], None]] = None) -> None:
    """Put weights on their integers, by the quantized inputs of their layers.

    Inputs are those of the model as it is, its weights rounded to nearest, in one
    pass over the images [choice: GPTQ rounds layer after layer]. With several
    processes each runs its part of the images, and all round alike.

    Args:
        ops (dict[str, QuantOp]): From :func:`ops_to_round`, of a calibrated model.
        images (Tensor): Normalized images of shape (N, C, H, W).
        forward (Callable): Runs the model on a batch of them.
        batch_size (int): Images in a batch. Defaults to 8.
        progress (Callable, optional): Called with the number of images of
            each finished batch. Defaults to None.

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

    handles = [op.register_forward_pre_hook(note) for op in moments]
    try:
        with torch.no_grad():
            for batch in own_part(images).split(batch_size):
                forward(batch)
                if progress is not None:
                    progress(len(batch))
    finally:
        for handle in handles:
            handle.remove()
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

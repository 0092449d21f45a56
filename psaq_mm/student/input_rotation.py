# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Rotate the inputs of a student's linear layers about their means on images."""
from contextlib import ExitStack
from typing import Any, Callable, Dict

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from psaq_mm.ops import named_rotations, quantization_enabled
from psaq_mm.processes import run_images
from psaq_mm.quantization.observers import NOTHING_OBSERVED


def rotate_inputs(model: nn.Module, images: Tensor, forward: Callable[[Tensor], None],
                  batch_size: int = 8) -> None:
    """Rotate the inputs of linear layers that ask for it and are not rotated yet, about their
    means on the images. What the model computes does not change.

    Raises:
        ValueError: If an input has values that are not finite, or a layer was given none; it
            names the module. Nothing is rotated then.
    """
    names: Dict[Any, str] = {model.get_submodule(name): name
                             for name, rotation in named_rotations(model) if not rotation.active}
    if not names:
        return
    sums: Dict[nn.Module, Tensor] = {op: torch.zeros_like(op.weight[0]) for op in names}
    counts = {op: torch.zeros_like(total[0]) for op, total in sums.items()}

    def add(op: nn.Module, args: Any) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        sums[op] += rows.sum(0)
        counts[op] += len(rows)

    with ExitStack() as hooks, quantization_enabled(model, False):
        for op in names:
            hooks.enter_context(op.register_forward_pre_hook(add))
        run_images(forward, images, batch_size)
    for op, name in names.items():
        all_reduce(sums[op])
        all_reduce(counts[op])
        if not counts[op]:
            raise ValueError(f'{name} (input): {NOTHING_OBSERVED}')
        if not torch.isfinite(sums[op]).all():
            raise ValueError(f'{name} (input): it holds NaN or infinite values')
    for op in names:
        op.rotate_input(sums[op] / counts[op])

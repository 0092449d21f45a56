# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Set the ranges of a student on images."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from torch import Tensor, nn

from psaq_mm.ops import named_quant_ops, set_quantization
from psaq_mm.quantization import Quantizer


def calibrate_ranges(model: nn.Module, images: Tensor, forward: Callable[[Tensor], None],
                     batch_size: int = 8,
                     progress: Optional[Callable[[int], None]] = None) -> None:
    """Observe the float activations on images, set the ranges, switch on.

    With several processes each runs its part of the images, and all set the
    same ranges.

    Args:
        model (nn.Module): A model with quantized ops.
        images (Tensor): Normalized images of shape (N, C, H, W).
        forward (Callable): Runs the model on a batch of them.
        batch_size (int): Images in a batch. Defaults to 8.
        progress (Callable, optional): Called with the number of images of
            each finished batch. Defaults to None.

    Raises:
        ValueError: If a quantizer saw no values, or values that are not
            finite; it names the module and role. Quantization is then off.
    """
    observed: Dict[Quantizer, str] = {}
    for name, op in named_quant_ops(model):
        for role, quantizer in op.quantizers.items():
            assert isinstance(quantizer, Quantizer)
            if role != 'weight':
                observed[quantizer] = f'{name} ({role})'
    set_quantization(model, False)
    for quantizer in observed:
        quantizer.start_observing()
    try:
        with torch.no_grad(), _errors_named(observed):
            for batch in own_part(images).split(batch_size):
                forward(batch)
                if progress is not None:
                    progress(len(batch))
        _merge_processes(list(observed))
        for quantizer, name in observed.items():
            try:
                quantizer.finish_observing()
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from error
    finally:
        for quantizer in observed:
            quantizer.observer = None
    set_quantization(model, True)


def own_part(images: Tensor) -> Tensor:
    """The images of this process; all of them if there are too few to split."""
    world = get_world_size()
    return images[get_rank()::world] if len(images) >= world else images


def _merge_processes(quantizers: List[Quantizer]) -> None:
    """Let every process know what the others saw."""
    if get_world_size() == 1:
        return
    own = [q.observer.snapshot('cpu') for q in quantizers if q.observer is not None]  # all do
    # In the order of ranks, as a rule may depend on it: all must set the same ranges.
    for quantizer, *parts in zip(quantizers, *all_gather_object(own)):
        first, *others = (part.snapshot(quantizer.scale.device) for part in parts)
        first.merge(others)
        quantizer.observer = first


@contextmanager
def _errors_named(quantizers: Dict[Quantizer, str]) -> Iterator[None]:
    """Within the block, a ValueError that one of them raises bears its name."""
    at_work: List[str] = []

    def begin(quantizer: Quantizer, args: Any) -> None:
        at_work.append(quantizers[quantizer])

    def end(quantizer: Quantizer, args: Any, output: Any) -> None:
        at_work.clear()

    handles = [hook for quantizer in quantizers
               for hook in (quantizer.register_forward_pre_hook(begin),
                            quantizer.register_forward_hook(end))]
    try:
        yield
    except ValueError as error:
        if at_work:
            raise ValueError(f'{at_work[0]}: {error}') from error
        raise
    finally:
        for handle in handles:
            handle.remove()

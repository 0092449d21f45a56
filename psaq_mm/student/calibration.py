# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Set the ranges of a student on images."""
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional

from mmengine.dist import all_gather_object, get_world_size
from torch import Tensor, nn

from psaq_mm.adapters import Adapter, find_adapter
from psaq_mm.adapters.hosts import matching_adapter
from psaq_mm.devices import module_device
from psaq_mm.errors import UserError
from psaq_mm.modes import evaluating
from psaq_mm.ops import named_quant_ops, named_quantizers, quantization_enabled
from psaq_mm.processes import run_images
from psaq_mm.quantization import Quantizer
from psaq_mm.quantization.quantizer import restoring_ranges
from psaq_mm.recipe.checks import check_progress

from .history import note, require_images, require_student
from .input_rotation import rotate_inputs


def calibrate(student: nn.Module, images: Tensor, batch_size: int = 8,
              progress: Optional[Callable[[int], None]] = None) -> nn.Module:
    """Set the ranges of a student on images; from then on it quantizes.

    Args:
        student (nn.Module): From :func:`psaq_mm.prepare`; changed in place. Ranges that it
            has are set anew, those of weights excepted.
        images (Tensor): Normalized images of shape (N, C, H, W).
        batch_size (int): Images in a forward pass. Defaults to 8.
        progress (Callable, optional): Called with the number of images of
            each finished batch. Defaults to None.

    Returns:
        nn.Module: The student.

    Raises:
        UserError: If nothing is quantized, there are no images, or a
            quantizer saw no values or values that are not finite.
    """
    require_student(student, 'calibrate')
    require_images(student, images, 'calibrate', batch_size)
    check_progress(progress)
    with forward_of_scope(student, 'calibration') as forward:
        calibrate_ranges(student, images, forward, batch_size, progress)
    note(student, image_size=(images.shape[-2], images.shape[-1]))
    return student


def scope_of(model: nn.Module, adapter: Adapter) -> str:
    """``model`` if a quantized op lies outside of the backbone, else ``backbone``."""
    inside = all(adapter.in_scope(model, name, 'backbone') for name, _ in named_quant_ops(model))
    return 'backbone' if inside else 'model'


@contextmanager
def forward_of_scope(model: nn.Module,
                     what: str) -> Iterator[Callable[[Tensor], None]]:
    """Within the block, a function that runs the quantized part of a frozen model.

    Args:
        model (nn.Module): With quantized ops.
        what (str): What is done, for the message of an error.
    """
    adapter = find_adapter(model)
    scope, device = scope_of(model, adapter), module_device(model)
    try:
        with evaluating(model):
            yield lambda batch: adapter.forward(model, batch.to(device), scope)
    except UserError:  # of a callback, or of another process
        raise
    except ValueError as error:
        raise UserError(f'{what} failed: {error}') from error


def calibrate_ranges(model: nn.Module, images: Tensor, forward: Callable[[Tensor], None],
                     batch_size: int = 8,
                     progress: Optional[Callable[[int], None]] = None) -> None:
    """:func:`calibrate`, by any function that runs the model on a batch of images.

    With several processes each runs its part of the images, and all set the same ranges. Inputs
    that are to be rotated are so before ranges are set, once.

    Raises:
        ValueError: If a quantizer saw no values, or values that are not
            finite; it names the module and role. No range has changed then.
    """
    rotate_inputs(model, images, forward, batch_size)
    observed = {quantizer: f'{name} ({role})' for name, role, quantizer in
                named_quantizers(model) if role != 'weight'}
    weights = {op.weight_quantizer: (f'{name} (weight)', op) for name, op in
               named_quant_ops(model)
               if op.weight_quantizer is not None and not op.weight_quantizer.calibrated}
    try:
        with restoring_ranges([*observed, *weights]):
            for quantizer in observed:
                quantizer.start_observing()
            _show_extreme_pixels(model)
            with quantization_enabled(model, False), _errors_named(observed):
                run_images(forward, images, batch_size, progress)
            _merge_processes(list(observed))
            steps = [(name, quantizer.finish_observing) for quantizer, name in observed.items()]
            steps += [(name, op.set_weight_range) for name, op in weights.values()]
            for name, set_range in steps:
                try:
                    set_range()
                except ValueError as error:
                    raise ValueError(f'{name}: {error}') from error
    finally:
        for quantizer in observed:
            quantizer.observer = None


def _show_extreme_pixels(model: nn.Module) -> None:
    """Let observers of pixels see the darkest and the brightest there are, as far as it is
    known how a model's images are normalized [choice].

    Synthetic images may have neither, and photographs of dark scenes are little else: a range
    that cuts them off changes all that follows [measured].
    """
    adapter = matching_adapter(model)
    pixels = adapter.extreme_pixels(model) if adapter is not None else None
    if adapter is None or pixels is None:
        return
    for name, role, quantizer in named_quantizers(model):
        if role == 'input' and adapter.is_patch_embed(model, name) and quantizer.observer:
            quantizer.observer.observe(pixels.to(module_device(model)), quantizer.axis)


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

    with ExitStack() as hooks:
        for quantizer in quantizers:
            hooks.enter_context(quantizer.register_forward_pre_hook(begin))
            hooks.enter_context(quantizer.register_forward_hook(end))
        try:
            yield
        except ValueError as error:
            if at_work:
                raise ValueError(f'{at_work[0]}: {error}') from error
            raise

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Ranges of a student, on images."""
import contextlib
from typing import Any, Callable, Iterator, Optional, Tuple

from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.adapter import Adapter, module_device
from psaq_mm.errors import UserError
from psaq_mm.recipe import CalibrationSettings
from psaq_mm.student import as_many_pixels, calibrate_ranges, carry_ranges_over
from psaq_mm.synthesis import mosaics
from psaq_mm.ops import named_quant_ops

from psaq_mm.synthesis.teacher import frozen


def check_calibration(model: nn.Module, settings: CalibrationSettings) -> None:
    """Raise if a model takes no images of the size for the last ranges.

    Args:
        model (nn.Module): The float model.
        settings (CalibrationSettings): The ``calibration`` section.

    Raises:
        UserError: If so.
    """
    if settings.size is None:
        return
    try:
        find_adapter(model).check_image_size(model, settings.size)
    except UserError as error:
        raise UserError(str(error).replace('synthesis.', 'calibration.')) from error


def scope_of(model: nn.Module, adapter: Adapter) -> str:
    """``model`` if a quantized op lies outside of the backbone, else ``backbone``."""
    inside = all(adapter.in_scope(model, name, 'backbone') for name, _ in named_quant_ops(model))
    return 'backbone' if inside else 'model'


def require_calibrated(student: nn.Module) -> None:
    """Raise if a model is not quantized, or has no ranges yet.

    Raises:
        UserError: If so.
    """
    if not any(quantizer.enabled for _, op in named_quant_ops(student)
               for quantizer in op.quantizers.values()):
        raise UserError('the student is not calibrated: call psaq_mm.quantize and '
                        'psaq_mm.calibrate first')


def require_images(images: Any, what: str) -> None:
    """Raise if these are no images.

    Args:
        images (Any): Should be normalized images of shape (N, C, H, W).
        what (str): What needs them, for the message.

    Raises:
        UserError: If they are not.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() \
            or images.dim() != 4 or len(images) == 0:
        got = f'{images.dtype} {tuple(images.shape)}' if isinstance(images, Tensor) \
            else type(images).__name__
        raise UserError(f'{what} needs float images of shape (N, C, H, W) with N of at '
                        f'least 1, got {got}')


@contextlib.contextmanager
def observing(model: nn.Module, what: str = 'calibration') -> Iterator[Callable[[Tensor], None]]:
    """A frozen model, and what runs its quantized part on a batch of images."""
    adapter = find_adapter(model)
    scope, device = scope_of(model, adapter), module_device(model)
    try:
        with frozen(model):
            yield lambda batch: adapter.forward(model, batch.to(device), scope)
    except ValueError as error:
        raise UserError(f'{what} failed: {error}') from error


def calibrate(model: nn.Module, images: Tensor,
              progress: Optional[Callable[[int], None]] = None, **settings: Any) -> nn.Module:
    """Set the ranges of a quantized model on images, and switch it on.

    Args:
        model (nn.Module): From :func:`quantize`.
        images (Tensor): Normalized images of shape (N, C, H, W).
        progress (Callable, optional): Called with the number of images of
            each finished batch. Defaults to None.
        **settings: Of :class:`CalibrationSettings`; ``image_size`` is left to
            :func:`refit`, which takes it as ``size``.

    Returns:
        nn.Module: The same model.

    Raises:
        UserError: If nothing is quantized, there are no images, or a
            quantizer saw no values or values that are not finite.
    """
    chosen = CalibrationSettings.from_dict(settings)
    if next(named_quant_ops(model), None) is None:
        raise UserError('the model has no quantized modules: call psaq_mm.quantize first')
    require_images(images, 'calibration')
    with observing(model) as forward:
        calibrate_ranges(model, images, forward, chosen.batch_size, progress)
    return model


def refit(model: nn.Module, images: Tensor, size: Tuple[int, int],
          learnt: bool = False, progress: Optional[Callable[[int], None]] = None,
          **settings: Any) -> nn.Module:
    """Set the ranges once more, for images of another size.

    Args:
        model (nn.Module): A calibrated model.
        images (Tensor): Those it was calibrated or evolved on.
        size (tuple[int, int]): Height and width in pixels.
        learnt (bool): Whether ranges of activations were learnt; they are
            then scaled as the range rule's are, not replaced. Defaults to
            False.
        progress (Callable, optional): Called with the number of images of
            each finished batch. Defaults to None.
        **settings: Of :class:`CalibrationSettings`.

    Returns:
        nn.Module: The same model.

    Raises:
        UserError: As :func:`calibrate` does.
    """
    chosen = CalibrationSettings.from_dict(settings)
    others = mosaics(images, size)
    if learnt and others is images:
        return model
    if not learnt:
        return calibrate(model, others, progress,
                         batch_size=as_many_pixels(chosen.batch_size, images, others))
    with observing(model) as forward:
        carry_ranges_over(model, images, others, forward, chosen.batch_size, progress)
    return model

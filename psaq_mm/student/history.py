# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What was done to a model: the state that one step leaves to the next."""
from dataclasses import dataclass, replace
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.devices import module_device
from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops, named_quantizers, named_rotations
from psaq_mm.recipe.checks import check_model, check_positive_int, check_seed

ATTRIBUTE = 'psaq_mm_history'
"""Name of the attribute of a model that holds it; a copy of the model has it too."""


@dataclass(frozen=True)
class History:
    """What the steps have done to a model so far.

    What was learned and rounded is noted on the quantizers and ops themselves.

    Args:
        channel_limit (float, optional): Limit that :func:`psaq_mm.equalize` kept to; None
            if it was not called. Defaults to None.
        image_size (tuple[int, int], optional): Height and width of the images that the
            ranges were set on; None before, or if that is not known. Defaults to None.
        reconstructed (tuple[str]): Blocks that :func:`psaq_mm.reconstruct` has let learn.
            Defaults to none.
    """
    channel_limit: Optional[float] = None
    image_size: Optional[Tuple[int, int]] = None
    reconstructed: Tuple[str, ...] = ()


def history_of(model: nn.Module) -> History:
    """The history of a model; an empty one if nothing was noted."""
    history: History = model.__dict__.get(ATTRIBUTE, History())
    return history


def note(model: nn.Module, **changes: Any) -> None:
    """Note in the history of a model what a step has done to it."""
    setattr(model, ATTRIBUTE, replace(history_of(model), **changes))


def require_float(model: nn.Module, step: str) -> None:
    """Raise a :class:`UserError` if a model is quantized already."""
    check_model(model)
    name = next((name for name, _ in named_quant_ops(model)), None)
    if name is not None:
        raise UserError(f'psaq_mm.{step} needs the float model, and this one is quantized '
                        f'(module {name!r}): pass the float model, or psaq_mm.unwrap it first')


def require_equalized(model: nn.Module, limit: Optional[float], step: str) -> None:
    """Raise a :class:`UserError` if a float model was not equalized for this limit."""
    done = history_of(model).channel_limit
    if limit == done:
        return
    if limit is None:
        raise UserError(f'the model was equalized for channel_limit={done:g}; set '
                        'quantization.channel_limit to that')
    raise UserError(f'psaq_mm.{step}: call psaq_mm.equalize first, with the same '
                    f'quantization.channel_limit={limit:g}, or set it to None for none')


def require_student(model: nn.Module, step: str) -> None:
    """Raise a :class:`UserError` if a model has no quantized ops."""
    check_model(model)
    if next(named_quant_ops(model), None) is None:
        raise UserError(f'psaq_mm.{step} needs a student, and this model has no quantized '
                        'modules: call psaq_mm.prepare first')


def require_calibrated(model: nn.Module, step: str) -> None:
    """Raise a :class:`UserError` if a model is not quantized, or a range of it is not set."""
    require_student(model, step)
    for name, role, quantizer in named_quantizers(model):
        if not quantizer.calibrated:
            raise UserError(f'psaq_mm.{step} needs a calibrated student, and {name} ({role}) has '
                            'no range: call psaq_mm.calibrate first')


def require_images(model: nn.Module, images: object, step: str, batch_size: int = 1) -> Tensor:
    """Raise if these are no images of teacher or student, or make no batches of that size.

    Args:
        images (Tensor): Should be normalized float32 images of shape (N, C, H, W).
        step (str): What needs them, for the message.
        batch_size (int): Should be 1 or more. Defaults to 1.

    Returns:
        Tensor: The images.

    Raises:
        UserError: If they are not.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.float32 \
            or images.dim() != 4 or len(images) == 0:
        got = f'{images.dtype} {tuple(images.shape)}' if isinstance(images, Tensor) \
            else type(images).__name__
        raise UserError(f'psaq_mm.{step} needs float32 images of shape (N, C, H, W) with N of at '
                        f'least 1, got {got}')
    channels = find_adapter(model).valid_range(model)[0].shape[1]
    if images.shape[1] != channels:
        raise UserError(f'psaq_mm.{step}: the model takes images of {channels} channels, got '
                        f'{images.shape[1]}')
    check_positive_int(batch_size, 'batch_size')
    return images


def require_pair(student: nn.Module, teacher: nn.Module, images: object, step: str, seed: int,
                 batch_size: int = 1) -> None:
    """Raise a :class:`UserError` unless a student can learn from its teacher, the float model
    that it is a copy of, on these images."""
    check_seed(seed, 'seed')
    require_calibrated(student, step)
    require_float(teacher, f'{step} (as teacher)')
    require_images(student, images, step, batch_size)
    require_not_rounded(student, step)
    require_teacher_of(student, teacher)


def require_teacher_of(student: nn.Module, teacher: nn.Module) -> None:
    """Raise a :class:`UserError` if a student is no copy of a float model: a weight is missing, or
    differs that the student cannot have learned; or they are on two devices.
    """
    if module_device(student) != module_device(teacher):
        raise UserError(f'the student is on {module_device(student)} and the teacher on '
                        f'{module_device(teacher)}: move them to one device first')
    rotated: Dict[str, Any] = {name: student.get_submodule(name)
                               for name, _ in named_rotations(student)}
    learned = tuple(f'{block}.' for block in history_of(student).reconstructed)
    weights = dict(teacher.named_parameters(remove_duplicate=False))
    own = dict(student.named_parameters(remove_duplicate=False))
    settled = {id(p) for _, op in named_quant_ops(student) if op.weight_settled
               for p in op.parameters(recurse=False)}
    for name, weight in own.items():
        layer, _, part = name.rpartition('.')
        if layer in rotated and part == 'bias':  # it holds what the mean of the input gives
            continue
        other = weights.get(name)
        if layer in rotated and other is not None and other.shape == weight.shape:
            other = rotated[layer].in_own_basis(other)
        if other is None or other.shape != weight.shape \
                or not (id(weight) in settled or name.startswith(learned)
                        or _alike(weight, other)):
            found = 'is missing' if other is None else 'differs'
            raise UserError(f'the teacher is not the float model of the student: {name} {found}; '
                            'psaq_mm.equalize comes before psaq_mm.prepare, which copies the '
                            'teacher')


def require_not_rounded(student: nn.Module, step: str) -> None:
    """Raise if a weight is on its integers by GPTQ: learning would undo it."""
    for name, op in named_quant_ops(student):
        if op.weight_settled and torch.equal(op.quantized_weight(), op.weight):
            raise UserError(f'psaq_mm.{step} comes before psaq_mm.round_weights, and the weight '
                            f'of {name} is rounded already: call psaq_mm.prepare, calibrate, '
                            f'{step} and round_weights in this order')


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.detach().float().cpu(), other.detach().float().cpu(),
                          rtol=1e-3, atol=1e-6)

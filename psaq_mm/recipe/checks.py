# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Checks of single values, with the message that a user gets."""
from typing import Any, Tuple

from torch import nn

from psaq_mm.errors import UserError
from psaq_mm.sections import is_integer, is_number


def check_positive_int(value: Any, key: str) -> int:
    """Raise a :class:`UserError` unless a value is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise UserError(f'{key} must be a positive integer, got {value!r}')
    return value


def check_number(value: Any, key: str, low: float, high: float) -> float:
    """Raise a :class:`UserError` unless a value is a number in [low, high]."""
    if not is_number(value) or not low <= value <= high:
        raise UserError(f'{key} must be a number from {low:g} to {high:g}, got {value!r}')
    return float(value)


def check_model(model: object) -> None:
    """Raise a :class:`UserError` unless this is a module."""
    if not isinstance(model, nn.Module):
        raise UserError(f'model must be a module with its weights, got {type(model).__name__}')


def check_progress(progress: object) -> None:
    """Raise a :class:`TypeError` unless this can be called, or is None."""
    if progress is not None and not callable(progress):
        raise TypeError(f'progress must be a function, got {progress!r}')


def check_seed(value: Any, key: str) -> int:
    """Raise a :class:`UserError` unless a value is a seed that all generators take."""
    if not is_integer(value) or not 0 <= value < 2**32:
        raise UserError(f'{key} must be an integer from 0 to 2^32 - 1, got {value!r}')
    return value


def sides(size: Any, expected: str) -> Tuple[int, int]:
    """Height and width of an ``image_size``, in pixels.

    Raises:
        UserError: If it is not as expected.
    """
    values = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(values) != 2 or not all(is_integer(side) and side > 0 for side in values):
        raise UserError(f'image_size must be {expected}, got {size!r}')
    return values[0], values[1]

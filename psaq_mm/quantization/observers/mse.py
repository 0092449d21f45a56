# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A range rule that weighs clipping against rounding."""
from typing import TYPE_CHECKING, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.registry import OBSERVERS
from psaq_mm.sections import is_integer

from .sampling import SamplingObserver

if TYPE_CHECKING:
    from ..spec import QuantSpec


@OBSERVERS.register_module()
class MSEObserver(SamplingObserver):
    """The shrunken min-max range with the smallest mean squared error.

    Candidates are the min-max range times a factor from 1 down to
    ``min_factor``; the error is measured on a subsample of what was seen.

    Args:
        spec (QuantSpec): What the range is for.
        candidates (int): Number of factors tried. Defaults to 60.
        min_factor (float): The smallest factor, in (0, 1). Defaults to 0.2.
        samples (int): Values kept of each batch and range. Defaults to 8192.
    """

    power = 2
    """int: Of an error, before the mean is taken."""

    def __init__(self, spec: 'QuantSpec', candidates: int = 60, min_factor: float = 0.2,
                 samples: int = 8192) -> None:
        super().__init__(spec, samples)
        if not is_integer(candidates) or candidates < 2:
            raise UserError('observer.candidates must be an integer of at least 2, got '
                            f'{candidates!r}')
        if not 0 < min_factor < 1:
            raise UserError(f'observer.min_factor must be in (0, 1), got {min_factor!r}')
        self.candidates = candidates
        self.min_factor = min_factor

    def range(self) -> Tuple[Tensor, Tensor]:
        from ..fake_quantize import fake_quantize
        from ..ranges import scale_and_zero_point
        lower, upper = super().range()
        values = self.sample()
        best = torch.full_like(lower, float('inf'))
        best_lower, best_upper = lower, upper
        for factor in torch.linspace(1., self.min_factor, self.candidates).tolist():
            scale, zero_point = scale_and_zero_point(lower * factor, upper * factor, self.spec)
            error = fake_quantize(values, scale, zero_point, self.spec.integer_range, axis=0)
            error = error.sub_(values).abs_().pow_(self.power).mean(1)
            better = error < best
            best = torch.where(better, error, best)
            best_lower = torch.where(better, lower * factor, best_lower)
            best_upper = torch.where(better, upper * factor, best_upper)
        return best_lower, best_upper

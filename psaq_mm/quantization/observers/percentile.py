# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A range rule that clips a fraction of the values."""
from typing import TYPE_CHECKING, Tuple

from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.registry import OBSERVERS

from .sampling import SamplingObserver

if TYPE_CHECKING:
    from ..spec import QuantSpec


@OBSERVERS.register_module()
class PercentileObserver(SamplingObserver):
    """The range that holds a fraction of the values, by a subsample.

    Args:
        spec (QuantSpec): What the range is for.
        percentile (float): Fraction of the values inside, in (0.5, 1]; the
            rest is clipped half at each end. Defaults to 0.9999.
        samples (int): Values kept of each batch and range. Defaults to 65536.
    """

    def __init__(self, spec: 'QuantSpec', percentile: float = 0.9999,
                 samples: int = 65536) -> None:
        super().__init__(spec, samples)
        if not 0.5 < percentile <= 1:
            raise UserError(f'observer.percentile must be in (0.5, 1], got {percentile!r}')
        self.percentile = percentile

    def range(self) -> Tuple[Tensor, Tensor]:
        values = self.sample().sort(dim=1).values
        last = values.shape[1] - 1
        cut = (1 - self.percentile) / 2 * last
        low, high = int(cut + 0.5), last - int(cut + 0.5)
        return values[:, low], values[:, high]

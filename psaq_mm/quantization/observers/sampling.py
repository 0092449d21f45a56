# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Range rules that need values, not only their extremes: a bounded sample."""
from typing import TYPE_CHECKING, List, Sequence

import torch
from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.sections import is_integer

from .min_max import MinMaxObserver
from .observer import NOTHING_OBSERVED, Observer

if TYPE_CHECKING:
    from ..spec import QuantSpec


class SamplingObserver(MinMaxObserver):
    """Keeps some values of each batch, besides the exact extremes of all.

    The sample is random, from a generator with a fixed seed: evenly spaced
    values of an activation could all belong to one channel.

    Args:
        spec (QuantSpec): What the range is for.
        samples (int): Values kept of each batch and range.
    """

    def __init__(self, spec: 'QuantSpec', samples: int) -> None:
        super().__init__(spec)
        if not is_integer(samples) or samples < 2:
            raise UserError(f'observer.samples must be an integer of at least 2, got {samples!r}')
        self.samples = samples
        self.kept: List[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def update(self, rows: Tensor) -> None:
        super().update(rows)
        count = rows.shape[1]
        if count > self.samples:
            index = torch.randint(count, (self.samples, ), generator=self._generator)
            rows = rows[:, index.to(rows.device)]
        else:
            rows = rows.clone()
        self.kept.append(rows)

    def merge(self, others: Sequence[Observer]) -> None:
        super().merge(others)
        for other in others:
            assert isinstance(other, SamplingObserver)
            self.kept += other.kept

    def sample(self) -> Tensor:
        """Tensor: The values that were kept, shape (C, M).

        Raises:
            ValueError: If nothing was seen.
        """
        if not self.kept:
            raise ValueError(NOTHING_OBSERVED)
        return torch.cat(self.kept, 1)

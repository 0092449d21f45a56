# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The naive range rule: the smallest and the largest value seen."""
from typing import TYPE_CHECKING, Optional, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.registry import OBSERVERS

from .observer import NOTHING_OBSERVED, Observer

if TYPE_CHECKING:
    from ..spec import QuantSpec


@OBSERVERS.register_module()
class MinMaxObserver(Observer):
    """Running minimum and maximum, "naive" in the paper [v1]."""

    def __init__(self, spec: 'QuantSpec') -> None:
        super().__init__(spec)
        self.lower: Optional[Tensor] = None
        self.upper: Optional[Tensor] = None

    def update(self, rows: Tensor) -> None:
        lower, upper = torch.aminmax(rows, dim=1)
        if self.lower is None or self.upper is None:
            self.lower, self.upper = lower, upper
        else:
            self.lower = torch.minimum(self.lower, lower)
            self.upper = torch.maximum(self.upper, upper)

    def merge(self, others: Sequence[Observer]) -> None:
        for other in others:
            assert isinstance(other, MinMaxObserver)
            if other.lower is None or other.upper is None:
                continue
            lower, upper = other.lower, other.upper
            if self.lower is not None and self.upper is not None:
                lower = torch.minimum(self.lower, lower)
                upper = torch.maximum(self.upper, upper)
            self.lower, self.upper = lower, upper
            self.seen += other.seen

    def range(self) -> Tuple[Tensor, Tensor]:
        if self.lower is None or self.upper is None:
            raise ValueError(NOTHING_OBSERVED)
        return self.lower, self.upper

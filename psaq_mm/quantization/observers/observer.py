# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What every range rule has in common."""
import copy
from typing import TYPE_CHECKING, Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..spec import QuantSpec

NOTHING_OBSERVED = ('no values were observed; if inference does not use this module, name it in '
                    'quantization.exclude')


class Observer:
    """Sees the values of a tensor batch by batch, then names their range.

    A new rule is a subclass in a file of its own, registered with
    ``@OBSERVERS.register_module()``, that implements :meth:`update`,
    :meth:`range` and, for several processes, :meth:`merge`.

    Args:
        spec (QuantSpec): What the range is for: bits and symmetry matter to
            rules that weigh clipping against rounding.
    """

    def __init__(self, spec: 'QuantSpec') -> None:
        self.spec = spec
        self.seen = 0
        """int: Number of elements seen so far."""

    def observe(self, x: Tensor, axis: Optional[int] = None) -> None:
        """Take in one batch.

        Args:
            x (Tensor): Any shape.
            axis (int, optional): Channel axis for per-channel ranges; None
                for one range. Defaults to None.

        Raises:
            ValueError: If a value is NaN or infinite: no range could hold it.
        """
        if x.numel() == 0:  # e.g. a head that got no proposals
            return
        rows = x.detach().float()
        rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).flatten(1)
        # One reduction tells: a sum is finite only if all terms are (or it
        # overflows, which the exact test then clears).
        if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
            raise ValueError('a tensor to be quantized holds NaN or infinite values')
        self.update(rows)
        self.seen += x.numel()

    def update(self, rows: Tensor) -> None:
        """Take in values of shape (C, M): M values for each of C ranges."""
        raise NotImplementedError

    def merge(self, others: 'Sequence[Observer]') -> None:
        """Take in what the same rule saw in other processes, on the same device."""
        raise NotImplementedError

    def snapshot(self, device: Any) -> 'Observer':
        """A copy of what was seen on a device, for :meth:`merge` in another process.

        It holds no generator, which torch before 2.4 cannot pickle, so it observes no more.
        """
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, list):
                return [moved(v) for v in value]
            return None if isinstance(value, torch.Generator) else value

        other = copy.copy(self)
        vars(other).update({name: moved(value) for name, value in vars(self).items()})
        return other

    def range(self) -> Tuple[Tensor, Tensor]:
        """tuple[Tensor, Tensor]: Lower and upper ends, shape (C,) each."""
        raise NotImplementedError

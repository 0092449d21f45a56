# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Learn scales and zero points, all in the same relative steps."""
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from psaq_mm.quantization import Quantizer


class RangeLearner:
    """Adam on the logarithms of scales, and on zero points as a fraction of
    the number of integers [choice].

    Scales of one model differ by orders of magnitude, so a step of the same
    size in the scale itself would be nothing to one and ruin another. All
    ranges are one flat tensor to the optimizer: a model has hundreds of them,
    most of one element.

    Args:
        quantizers (Sequence[Quantizer]): Calibrated ones, not asked for
            gradients yet.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        self.tensors: List[Tensor] = []
        self._integers: List[Optional[Tuple[int, int]]] = []  # of zero points
        units = [torch.empty(0)]
        for quantizer in quantizers:
            low, high = quantizer.spec.integer_range
            self.tensors.append(quantizer.scale)
            self._integers.append(None)
            units.append(torch.ones(quantizer.scale.numel()))
            if not quantizer.spec.symmetric:
                self.tensors.append(quantizer.zero_point)
                self._integers.append((low, high))
                units.append(torch.full((quantizer.zero_point.numel(), ), float(high - low)))
        device = self.tensors[0].device if self.tensors else torch.device('cpu')
        self._units = torch.cat(units).to(device)
        self._start = self._gather()
        self.offsets = torch.zeros_like(self._start).requires_grad_(True)
        """Tensor: What was learned: shape (all scales and zero points,)."""

    def _gather(self) -> Tensor:
        """Scales and zero points, one after the other."""
        return torch.cat([self._units[:0], *(t.detach().flatten() for t in self.tensors)])

    def require_grad(self, enabled: bool) -> None:
        """Let autograd reach the ranges, or no longer."""
        for tensor in self.tensors:
            tensor.requires_grad_(enabled)

    def collect_gradients(self) -> None:
        """Move the gradients of scales and zero points to :attr:`offsets`."""
        parts = [self._units[:0]]
        for tensor, integers in zip(self.tensors, self._integers):
            grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            # d/d log s = s d/ds
            parts.append((grad if integers else grad * tensor.detach()).flatten())
            tensor.grad = None
        self.offsets.grad = torch.cat(parts) * self._units

    def apply(self) -> None:
        """Write what was learned back to the quantizers."""
        offsets = self.offsets.detach()
        added, scaled = self._start + offsets * self._units, self._start * offsets.exp()
        start = 0
        with torch.no_grad():
            for tensor, integers in zip(self.tensors, self._integers):
                part = slice(start, start + tensor.numel())
                # 0 must stay in the range: the zero point is one of the integers.
                tensor.copy_((added[part].clamp(*integers) if integers
                              else scaled[part]).view(tensor.shape))
                start += tensor.numel()

    @property
    def moved(self) -> bool:
        """bool: Whether any range is not where it started."""
        return bool(self.offsets.detach().any())

    def state_dict(self) -> Dict[str, Any]:
        """A copy of what was learned, and what it is relative to."""
        return dict(start=self._start.cpu().clone(),
                    offsets=self.offsets.detach().cpu().clone())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the quantizers follow."""
        self._start = state['start'].to(self._start.device)
        with torch.no_grad():
            self.offsets.copy_(state['offsets'])
        self.apply()

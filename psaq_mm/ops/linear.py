# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized ``nn.Linear``."""
from typing import Any, Mapping, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.quantization import QuantSpec, Rotation

from .op import QuantOp, register_op


@register_op(nn.Linear)
class QuantLinear(QuantOp, nn.Linear):
    """Linear layer with quantized weight (out, in), input and output (..., C).

    If the spec of its input says ``rotate``, it has a weight and a bias of its own, and from
    :meth:`rotate_input` on its weight is in the basis of :attr:`rotation`.
    """

    roles = dict(weight=0, input=-1, output=-1)

    rotation: Optional[Rotation]

    @classmethod
    def from_float(cls, module: nn.Module, specs: Mapping[str, QuantSpec]) -> 'QuantLinear':
        op = super().from_float(module, specs)
        assert isinstance(op, QuantLinear)
        rotated = 'input' in specs and specs['input'].rotate
        op.rotation = Rotation(op.in_features) if rotated else None
        if rotated:  # another layer may share the parameters
            if op.bias is None:
                op.bias = nn.Parameter(torch.zeros_like(op.weight[:, 0]), op.weight.requires_grad)
            op.weight, op.bias = (nn.Parameter(value.detach().clone(), value.requires_grad)
                                  for value in (op.weight, op.bias))
        return op

    def rotate_input(self, mean: Tensor) -> None:
        """Bring weight and bias into the basis of :attr:`rotation`; outputs do not change.

        Args:
            mean (Tensor): Of each channel of the input, shape (in,).
        """
        assert self.rotation is not None and not self.rotation.active
        with torch.no_grad():
            self.bias.add_(self.weight @ mean)
            self.weight.copy_(self.rotation.rotate(self.weight))
        self.rotation.mean = mean

    def in_own_basis(self, weight: Tensor) -> Tensor:
        turned = self.rotation is not None and self.rotation.active
        return self.rotation.rotate(weight) if turned else weight  # type: ignore[union-attr]

    def undo_rotation(self) -> None:
        if self.rotation is None:
            return
        if self.rotation.active:
            with torch.no_grad():
                self.weight.copy_(self.rotation.rotate_back(self.weight))
                self.bias.sub_(self.weight @ self.rotation.mean)
        else:
            origin: Any = self.float_module
            with torch.no_grad():
                origin.weight.copy_(self.weight)
                if origin.bias is not None:
                    origin.bias.copy_(self.bias)
            self.weight, self.bias = origin.weight, origin.bias
        self.rotation = None

    def quantize(self, role: str, x: Tensor) -> Tensor:
        if role == 'input' and self.rotation is not None:
            x = self.rotation(x)
        return super().quantize(role, x)

    def weight_rows(self, weight: Tensor) -> Tensor:
        return weight

    def input_rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.in_features)

    def weight_of_rows(self, rows: Tensor) -> Tensor:
        return rows

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantize('input', x)
        return self.quantize('output', F.linear(x, self.quantized_weight(), self.bias))

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Adaptive average pooling to any size, for which ONNX has no operator."""
from typing import Any

import torch
from torch import Tensor, nn


def pooling_matrix(length: Any, bins: int) -> Tensor:
    """The weights by which bins average positions.

    Args:
        length (int or Tensor): Number of positions.
        bins (int): Number of bins. As in torch, they overlap if ``length`` is
            no multiple of it.

    Returns:
        Tensor: Shape (length, bins); each column sums to 1.
    """
    index, position = torch.arange(bins), torch.arange(length).unsqueeze(1)
    first, last = index * length // bins, ((index + 1) * length + bins - 1) // bins
    inside = (position >= first) & (position < last)
    return inside.float() / (last - first).float()


class ExportableAdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two small matrix products."""

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        size: Any = pool.output_size
        self.size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Args:
            x (Tensor): Shape (B, C, H, W).

        Returns:
            Tensor: Shape (B, C, h, w).
        """
        height, width = x.shape[2], x.shape[3]
        rows, cols = self.size
        x = torch.matmul(x, pooling_matrix(width, cols))
        return torch.matmul(pooling_matrix(height, rows).transpose(0, 1), x)


def replace_adaptive_pools(model: nn.Module) -> None:
    """Make the adaptive average pools of a model exportable, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.AdaptiveAvgPool2d:
                pool = ExportableAdaptivePool(child)
                if None not in pool.size:
                    setattr(parent, name, pool)

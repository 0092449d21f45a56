# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far an engine's outputs are from the simulated ones."""
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.quantization import sqnr_db

MINIMUM_SQNR = 35.
"""Decibel that are expected at 8 bits."""


def parity_images(size: Tuple[int, int], low: Tensor, high: Tensor, batch: int = 1,
                  seed: int = 0) -> Tensor:
    """Images to compare on, without data: noise of several sizes.

    Args:
        size (tuple[int, int]): Height and width.
        low (Tensor): Smallest normalized pixel, shape (1, C, 1, 1).
        high (Tensor): Largest normalized pixel, same shape.
        batch (int): Images. Defaults to 1.
        seed (int): Defaults to 0.

    Returns:
        Tensor: Normalized images of shape (B, C, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    channels = low.shape[1]
    total = torch.zeros(batch, channels, *size)
    for side in (4, 16, 64):
        noise = torch.rand(batch, channels, side, side, generator=generator)
        total += F.interpolate(noise, size=size, mode='bilinear', align_corners=False)
    total = (total - total.amin()) / (total.amax() - total.amin())
    return low + (high - low) * total


def compare(names: Sequence[str], simulated: Sequence[Tensor],
            engine: Sequence[Tensor]) -> List[Dict[str, Any]]:
    """Differences of outputs.

    Args:
        names (Sequence[str]): One for each output.
        simulated (Sequence[Tensor]): By the torch model.
        engine (Sequence[Tensor]): By the engine, same shapes.

    Returns:
        list[dict]: ``output``, ``max`` and ``mean`` of the absolute
        difference, and ``sqnr_db``, None where both are equal.
    """
    rows = []
    for name, a, b in zip(names, simulated, engine):
        difference = (a - b).abs()
        ratio = sqnr_db(a, b)
        rows.append(dict(output=name, max=float(difference.max()), mean=float(difference.mean()),
                         sqnr_db=round(ratio, 2) if math.isfinite(ratio) else None))
    return rows


def lowest_sqnr(rows: Sequence[Dict[str, Any]]) -> Optional[float]:
    """The smallest SQNR, None if all outputs are equal."""
    values = [row['sqnr_db'] for row in rows if row['sqnr_db'] is not None]
    return min(values) if values else None

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Compare the outputs of an engine with those of the simulation."""
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.quantization import sqnr_db

MINIMUM_SQNR = 35.
"""SQNR in decibels that is expected at 8 bits."""


def parity_images(size: Tuple[int, int], low: Tensor, high: Tensor, batch: int = 1,
                  seed: int = 0) -> Tensor:
    """Make images to compare on without data: smooth noise of several scales.

    Args:
        size (tuple[int, int]): Height and width.
        low (Tensor): Smallest normalized pixel, shape (1, C, 1, 1).
        high (Tensor): Largest normalized pixel, same shape.
        batch (int): Number of images. Defaults to 1.
        seed (int): Seed of the noise. Defaults to 0.

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
    """Measure how far outputs are apart.

    Args:
        names (Sequence[str]): One name for each output.
        simulated (Sequence[Tensor]): Outputs of the torch model.
        engine (Sequence[Tensor]): Outputs of the engine, of the same shapes.

    Returns:
        list[dict]: ``output``, ``max`` and ``mean`` of the absolute
        difference, and ``sqnr_db``, None where both are equal.

    Raises:
        UserError: If the number of outputs differs, or an output holds NaN or
            infinite values.
    """
    if not len(names) == len(simulated) == len(engine):
        raise UserError(f'the graph has {len(engine)} outputs, the model {len(simulated)}, '
                        f'expected {len(names)}: {", ".join(names)}')
    rows = []
    for name, a, b in zip(names, simulated, engine):
        difference = (a - b).abs()
        if not difference.isfinite().all():
            raise UserError(f'output {name} holds NaN or infinite values; check the weights of '
                            'the model')
        ratio = sqnr_db(a, b)
        rows.append(dict(output=name, max=float(difference.max()), mean=float(difference.mean()),
                         sqnr_db=round(ratio, 2) if math.isfinite(ratio) else None))
    return rows


def lowest_sqnr(rows: Sequence[Dict[str, Any]]) -> Optional[float]:
    """Return the smallest SQNR of :func:`compare`, None if all outputs are equal."""
    values = [row['sqnr_db'] for row in rows if row['sqnr_db'] is not None]
    return min(values) if values else None

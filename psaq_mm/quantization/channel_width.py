# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far channels are wider than the rest of a tensor."""
import torch
from torch import Tensor

STEPS = 16
"""Factors are multiples of 1/16 [choice]: machines that sum in another order agree, but for
values at the edge."""


def excess_width(mean_square: Tensor, limit: float) -> Tensor:
    """By what to divide each channel, so that none is much wider than the rest.

    A range for the whole tensor has to hold the widest channel, and gives the others the
    few integers that are left. In published Swin and DeiT models some channels after a
    LayerNorm are tens of times wider than most [RepQ-ViT, arXiv 2212.08254, figure 1].

    Args:
        mean_square (Tensor): Of the values of each channel, shape (C,).
        limit (float): How many times the width of the median channel is allowed, in
            root mean squares.

    Returns:
        Tensor: 1 for channels within the limit, else what brings them to it or a little
        below, shape (C,). With a median of 0, or not finite, all are 1.
    """
    width = mean_square.sqrt()
    allowed = limit * width.median()
    if not (torch.isfinite(allowed) and allowed > 0):
        return torch.ones_like(width)
    return torch.ceil((width / allowed).clamp_min(1) * STEPS) / STEPS

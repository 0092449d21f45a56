# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Random shifts and flips that images pass through before the model sees them.

They keep an image from fitting one alignment with the windows of the attention.
Every draw comes from an explicit generator on the CPU, so a seed gives the same
images on any device, and each call draws the same number of times.
"""
from typing import Tuple, Union

import torch
from torch import Tensor


def random_roll(images: Tensor, max_shift: Union[int, Tuple[int, int]],
                generator: torch.Generator) -> Tensor:
    """Shift the whole batch by one random offset; what leaves comes in opposite [v1].

    V1 rolls by up to 15 pixels per 224 in its first phase, up to 30 in its second.

    Args:
        images (Tensor): Images with shape of (B, C, H, W).
        max_shift (int | tuple[int, int]): Largest shift in pixels, to either
            side and included: one for both directions, or (vertical, horizontal).
        generator (torch.Generator): Source of the draws, on the CPU.

    Returns:
        Tensor: Shifted images with shape of (B, C, H, W).
    """
    limits = (max_shift, max_shift) if isinstance(max_shift, int) else max_shift
    vertical, horizontal = (
        int(torch.randint(-limit, limit + 1, (), generator=generator)) for limit in limits)
    return torch.roll(images, shifts=(vertical, horizontal), dims=(-2, -1))


def random_flip(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Mirror the whole batch left to right, or leave it as it is [v1].

    Args:
        images (Tensor): Images with shape of (B, C, H, W).
        probability (float): Probability of the flip. V1 uses 0.5.
        generator (torch.Generator): Source of the draw, on the CPU.

    Returns:
        Tensor: Images with shape of (B, C, H, W).
    """
    flip = torch.rand((), generator=generator).item() < probability
    return torch.flip(images, dims=(-1, )) if flip else images

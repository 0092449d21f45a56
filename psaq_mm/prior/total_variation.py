# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Total variation: the image prior that keeps neighbouring pixels alike."""
import math

import torch
from torch import Tensor

# The batch that V1's range of targets is for.
_V1_PIXELS = 32 * 224 * 224


def total_variation(images: Tensor) -> Tensor:
    """Total variation of a whole batch [v1].

    The sum over the four neighbour directions (horizontal, vertical and the two
    diagonals) of the L2 norm of all differences of the batch taken together.

    Args:
        images (Tensor): Normalised images with shape of (B, C, H, W).

    Returns:
        Tensor: Total variation, a scalar.
    """
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()  # a sum of millions of squares
    differences = (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(part) for part in differences]).sum()


def total_variation_target(batch: int,
                           height: int,
                           width: int,
                           generator: torch.Generator,
                           low: float = 2500.,
                           high: float = 3000.) -> float:
    """Draw the total variation that a batch should have.

    V1 draws it anew in each step, uniformly from (2500, 3000), for 32 images of
    224x224 [v1]. An L2 norm grows with the square root of the number of pixels,
    and so does the target of another shape [choice].

    Args:
        batch (int): Number of images B.
        height (int): Height H of the images.
        width (int): Width W of the images.
        generator (torch.Generator): Source of the draw, on the CPU.
        low (float): Smallest target for 32x224x224. Defaults to 2500.
        high (float): Largest target for 32x224x224. Defaults to 3000.

    Returns:
        float: The target v.
    """
    draw = torch.rand((), generator=generator, dtype=torch.float64).item()
    return (low + (high - low) * draw) * math.sqrt(batch * height * width / _V1_PIXELS)


def total_variation_loss(images: Tensor, target: float) -> Tensor:
    """Distance of a batch's total variation from its target: |TV - v| [v1].

    Args:
        images (Tensor): Normalised images with shape of (B, C, H, W).
        target (float): Target v.

    Returns:
        Tensor: Loss, a scalar.
    """
    return (total_variation(images) - target).abs()

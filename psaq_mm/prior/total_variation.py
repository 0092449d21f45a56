# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Total variation: the image prior that keeps neighbouring pixels alike."""
import math
from typing import Union

import torch
from torch import Tensor

# The pixels of the batch that V1's targets and weight are for.
_V1_PIXELS = 32 * 224 * 224


def total_variation(images: Tensor) -> Tensor:
    """Total variation of each image.

    The sum over the four neighbour directions (horizontal, vertical and the two
    diagonals) of the L2 norm of all its differences [v1; V1 takes the norms over
    a whole batch].

    Args:
        images (Tensor): Normalised images with shape of (B, C, H, W).

    Returns:
        Tensor: Total variation of each image, with shape of (B, ).
    """
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()  # a sum of thousands of squares
    differences = (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    norms = [torch.linalg.vector_norm(part.flatten(1), dim=1) for part in differences]
    return torch.stack(norms).sum(0)


def total_variation_loss(images: Tensor, target: Union[float, Tensor]) -> Tensor:
    """Distance of each image's total variation from a target: |TV - v|.

    In V1, TV is that of a batch of 32 images of 224x224, and v is drawn from
    (2500, 3000) [v1]. Here TV is what such a batch would have if each of its
    pixels were like those of the one image: TV_b * sqrt(32 * 224^2 / (H * W))
    [choice].

    That keeps the balance with the patch similarity entropy, for any batch and
    any size. V1 minimises -mean_b H_b + w |TV - v|. The gradient of its first
    part for image b is that of H_b / 32, and of its second, where 32 images are
    alike and so TV = sqrt(32) TV_b, that of w TV_b / sqrt(32): sqrt(32) w to 1,
    as it is here for -H_b + w |sqrt(32) TV_b - v|. As to the size, H_b is a mean
    over all pairs of patches, so its gradient at a pixel goes as 1 / (H W). That
    of a norm goes as 1 / sqrt(H W), and the factor 1 / sqrt(H W) makes them equal.

    Args:
        images (Tensor): Normalised images with shape of (B, C, H, W).
        target (float | Tensor): Target v, one for all or with shape of (B, ).

    Returns:
        Tensor: Loss of each image, with shape of (B, ).
    """
    factor = math.sqrt(_V1_PIXELS / (images.shape[-2] * images.shape[-1]))
    return (factor * total_variation(images) - target).abs()

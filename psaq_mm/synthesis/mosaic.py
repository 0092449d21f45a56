# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images of another size, made of those at hand."""
import math
from typing import Tuple

import torch
from torch import Tensor


def mosaic_count(images: Tensor, size: Tuple[int, int]) -> int:
    """How many images :func:`mosaics` gives."""
    height, width = size
    if images.shape[-2:] == (height, width):
        return len(images)
    return max(1, math.ceil(len(images) * images.shape[-2] * images.shape[-1]
                            / (height * width)))


def mosaics(images: Tensor, size: Tuple[int, int], seed: int = 0) -> Tensor:
    """Lay images side by side until they fill a size [choice].

    Scaling them would change how fine their texture is, and with it the
    activations; a mosaic has the same, and the padding of its size.

    Args:
        images (Tensor): Shape (N, C, h, w).
        size (tuple[int, int]): Height H and width W wanted.
        seed (int): Seed of the order. Defaults to 0.

    Returns:
        Tensor: Shape (M, C, H, W), with M such that there are about as many
        pixels as before, at least 1; the images themselves if they are of
        that size.
    """
    height, width = size
    if images.shape[-2:] == (height, width):
        return images
    rows, columns = -(-height // images.shape[-2]), -(-width // images.shape[-1])
    count = mosaic_count(images, size)
    generator = torch.Generator().manual_seed(seed)
    tiles = count * rows * columns
    order = torch.cat([torch.randperm(len(images), generator=generator)
                       for _ in range(-(-tiles // len(images)))])[:tiles]
    grid = images[order].view(count, rows, columns, *images.shape[1:])
    whole = grid.permute(0, 3, 1, 4, 2, 5).reshape(
        count, images.shape[1], rows * images.shape[-2], columns * images.shape[-1])
    return whole[..., :height, :width].contiguous()

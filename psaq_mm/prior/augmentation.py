# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Random shifts and flips that images pass through before the model sees them.

They keep an image from fitting one alignment with the windows of the attention.
V1 draws one flip and one shift for the whole batch [v1]; here each image has its
own, so that it does not depend on the batch [choice].
"""
from typing import Tuple, Union

import torch
from torch import Tensor


def random_roll(images: Tensor, max_shift: Union[int, Tuple[int, int]],
                draws: Tensor) -> Tensor:
    """Shift each image by a random offset; what leaves comes in opposite [v1].

    V1 rolls by up to 15 pixels per 224 in its first phase, up to 30 in its second.

    Args:
        images (Tensor): Images with shape of (B, C, H, W).
        max_shift (int | tuple[int, int]): Largest shift in pixels, to either
            side and included: one for both directions, or (vertical, horizontal).
        draws (Tensor): Uniform in [0, 1), float64 with shape of (B, 2), on the
            CPU: vertical and horizontal.

    Returns:
        Tensor: Shifted images with shape of (B, C, H, W).
    """
    limits = torch.tensor((max_shift, max_shift) if isinstance(max_shift, int) else max_shift)
    shifts = (draws * (2 * limits + 1)).floor().long() - limits
    return torch.stack([torch.roll(image, shift, dims=(-2, -1))
                        for image, shift in zip(images, shifts.tolist())])


def random_flip(images: Tensor, probability: float, draws: Tensor) -> Tensor:
    """Mirror images of shape (B, C, H, W) left to right, each with a probability [v1: 0.5].

    ``draws`` are uniform in [0, 1), with shape of (B, ).
    """
    flip = (draws < probability).to(images.device).view(-1, 1, 1, 1)
    return torch.where(flip, images.flip(-1), images)

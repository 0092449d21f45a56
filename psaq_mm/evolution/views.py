# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Views of images: what the student learns from.

Images that a model's prior gives are full of fine texture and strong colours
everywhere; photographs are also smooth, plain and dim in places. A student that
learns from the former alone gives up what the latter need [measured; choice].
Every draw comes from an explicit generator on the CPU, and each call draws the
same number of times.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def random_zoom(images: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Magnify a part of each image to its whole size [choice].

    Args:
        images (Tensor): Shape (B, C, H, W).
        largest (float): Largest magnification; each image has its own, uniform
            in [1, largest], and its own place. 1 leaves images as they are.
        generator (torch.Generator): Source of the draws, on the CPU.

    Returns:
        Tensor: Same shape, bilinearly interpolated.
    """
    height, width = images.shape[-2:]
    draws = torch.rand(len(images), 3, generator=generator).tolist()
    if largest == 1:
        return images
    views = []
    for image, (size, down, right) in zip(images, draws):
        factor = 1 + (largest - 1) * size
        h, w = max(1, round(height / factor)), max(1, round(width / factor))
        top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
        part = image[None, :, top:top + h, left:left + w]
        views.append(F.interpolate(part, (height, width), mode='bilinear', align_corners=False))
    return torch.cat(views)


def random_blend(images: Tensor, least: float, lower: Tensor, upper: Tensor,
                 generator: torch.Generator) -> Tensor:
    """Lower the contrast of each image, by blending it with a plain colour [choice].

    Args:
        images (Tensor): Shape (B, C, H, W), of valid pixels; so is the result.
        least (float): Least contrast; each image has its own, uniform in
            [least, 1], and its own colour, uniform in the valid range. 1 leaves
            images as they are.
        lower (Tensor): Smallest valid pixels, shape (1, C, 1, 1).
        upper (Tensor): Largest valid pixels, same shape.
        generator (torch.Generator): Source of the draws, on the CPU.

    Returns:
        Tensor: Same shape.
    """
    count, channels = images.shape[:2]
    draws = torch.rand(count, 1 + channels, 1, 1, generator=generator).to(images.device)
    if least == 1:
        return images
    contrast = least + (1 - least) * draws[:, :1]
    colour = lower + (upper - lower) * draws[:, 1:]
    return contrast * images + (1 - contrast) * colour

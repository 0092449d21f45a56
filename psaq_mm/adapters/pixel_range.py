# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The pixels that a model can see."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import UserError


def pixel_range(channels: int, mean: Optional[Tensor], std: Optional[Tensor],
                highest: float = 255.) -> Tuple[Tensor, Tensor]:
    """Smallest and largest pixel after a normalization.

    Args:
        channels (int): Channels C of an image.
        mean (Tensor, optional): Subtracted from pixels in [0, highest]; one
            value, or one for each channel. None for no normalization.
        std (Tensor, optional): Divided by, likewise.
        highest (float): The largest pixel before it. Defaults to 255.

    Returns:
        tuple[Tensor, Tensor]: Shape (1, C, 1, 1) each.

    Raises:
        UserError: If there are more or fewer values, or std is not positive.
    """
    low, high = torch.zeros(channels), torch.full((channels, ), highest)
    if mean is not None and std is not None:
        mean, std = mean.flatten().cpu(), std.flatten().cpu()
        if mean.numel() not in (1, channels) or (std <= 0).any():
            raise UserError('model.data_preprocessor: mean and std must have one value for '
                            f'each of {channels} channels, and std must be positive')
        low, high = (low - mean) / std, (high - mean) / std
    return low.view(1, -1, 1, 1), high.view(1, -1, 1, 1)

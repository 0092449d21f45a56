# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a host does to pixels before its model sees them, inside of the graph."""
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.adapters.seen_pixels import turns_channels

from ..subgraph import Size
from ..window_order import padded


def _at_least(length: Any, least: int) -> Any:
    if isinstance(length, Tensor):  # while a graph for all sizes is traced
        return torch.maximum(length, torch.tensor(least))
    return max(length, least)


class Pixels(nn.Module):
    """Channel order, mean and standard deviation, and padding.

    Args:
        preprocessor (nn.Module): The host's data preprocessor.
        sees_rgb (bool): Whether the host's images are RGB already. Ours are BGR, as OpenCV
            reads them.
        size (tuple[int, int], optional): Height and width of the images; None if they vary.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessor: Any, sees_rgb: bool, size: Optional[Size] = None) -> None:
        super().__init__()
        self.reverse = turns_channels(preprocessor) != sees_rgb
        normalized = getattr(preprocessor, '_enable_normalize', False)
        mean = preprocessor.mean if normalized else torch.zeros(3, 1, 1)
        std = preprocessor.std if normalized else torch.ones(3, 1, 1)
        self.register_buffer('mean', mean.detach().clone().float().reshape(1, -1, 1, 1))
        self.register_buffer('std', std.detach().clone().float().reshape(1, -1, 1, 1))
        testing = getattr(preprocessor, 'test_cfg', None) or {}
        self.divisor = int(testing.get('size_divisor') or 1) if hasattr(preprocessor, 'test_cfg') \
            else int(getattr(preprocessor, 'pad_size_divisor', 1) or 1)
        self.least: Optional[Size] = tuple(testing['size']) if testing.get('size') else None
        self.value = float(getattr(preprocessor, 'pad_val',  # of mmseg
                                   getattr(preprocessor, 'pad_value', 0)) or 0)
        self.size = size

    @property
    def padding(self) -> List[float]:
        """list[float]: The BGR pixel that stands for padding."""
        pixel = (self.value * self.std + self.mean).flatten()
        return [round(float(v), 4) for v in (pixel.flip(0) if self.reverse else pixel)]

    def padded_size(self, height: Any, width: Any) -> Any:
        """Height and width after padding."""
        if self.least is not None:
            height, width = (_at_least(*pair) for pair in zip((height, width), self.least))
        return padded(height, self.divisor), padded(width, self.divisor)

    def forward(self, images: Tensor) -> Tensor:
        """Args:
            images (Tensor): BGR in [0, 255], shape (B, 3, H, W).

        Returns:
            Tensor: What the model sees.
        """
        height, width = self.size or (images.shape[2], images.shape[3])
        if self.reverse:
            images = images.index_select(1, torch.tensor([2, 1, 0]))
        images = (images - self.mean) / self.std
        if self.divisor == 1 and self.least is None:
            return images
        rows, cols = self.padded_size(height, width)
        if self.size is not None and (rows, cols) == (height, width):
            return images
        return F.pad(images, [0, cols - width, 0, rows - height], value=self.value)

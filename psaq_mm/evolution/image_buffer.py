# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Old and new images side by side: what the student learns from."""
from typing import Any, Dict, List

import torch
from torch import Tensor


class ImageBuffer:
    """Images of past rounds, and the newest ones apart.

    The first images, made by the prior alone, always stay: images that only
    fool the student can be worse to learn from than those [choice; peer:
    SARDFQ]. Of what came later, the oldest are dropped first.

    Args:
        images (Tensor): Those of the warm start, shape (N, C, H, W), on the
            CPU.
        capacity (int): Images kept besides those; 0 keeps the newest round
            alone, and then nothing is mixed.
    """

    def __init__(self, images: Tensor, capacity: int) -> None:
        self.first = images
        self.capacity = capacity
        self.later: List[Tensor] = []  # the rounds, oldest first
        self.newest = images

    @property
    def images(self) -> Tensor:
        """Tensor: All images to learn from, shape (M, C, H, W)."""
        return torch.cat([self.first, *self.later]) if self.capacity else self.newest

    def add(self, images: Tensor) -> None:
        """Take in the images of a round, shape (B, C, H, W)."""
        self.newest = images
        if not self.capacity:
            return
        self.later.append(images)
        while sum(map(len, self.later)) > self.capacity:
            self.later.pop(0)

    def draw(self, count: int, new_fraction: float, generator: torch.Generator) -> Tensor:
        """A batch of shape (count, C, H, W): a fraction from the newest round, the rest of all."""
        new = round(count * new_fraction)
        parts = [_pick(self.newest, new, generator), _pick(self.images, count - new, generator)]
        return torch.cat(parts)

    def state_dict(self) -> Dict[str, Any]:
        """What :meth:`load_state_dict` continues from, but for the first images."""
        newest = None if self.newest is self.first else self.newest
        return dict(later=list(self.later), newest=newest)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a buffer with the same first images."""
        self.newest = self.first if state['newest'] is None else state['newest']
        self.later = list(state['later'])


def _pick(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` images, none twice before all were picked once."""
    rounds = -(-count // len(images)) if count else 0
    order = [torch.randperm(len(images), generator=generator) for _ in range(rounds)]
    return images[torch.cat(order)[:count]] if order else images[:0]

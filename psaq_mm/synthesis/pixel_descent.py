# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Adam on a batch of images that stay valid."""
import copy
from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor

from psaq_mm.prior import derived_seed


class PixelDescent:
    """A batch of images, moved by Adam and clamped to valid pixels [v1].

    Each image has random numbers of its own: what is drawn for it in a step
    depends on its seed and on the steps taken so far, and on nothing else.

    Args:
        images (Tensor): Normalized images of shape (B, C, H, W) to start from.
        seeds (Sequence[int]): One for each image.
        lower (Tensor): Smallest valid pixels, shape (1, C, 1, 1); the images
            live on its device.
        upper (Tensor): Largest valid pixels, same shape.
        betas (Sequence[float]): Adam's.
    """

    def __init__(self, images: Tensor, seeds: Sequence[int], lower: Tensor, upper: Tensor,
                 betas: Sequence[float]) -> None:
        self.lower, self.upper = lower, upper
        self.betas = (betas[0], betas[1])
        self.images = images.detach().clone().to(lower).requires_grad_(True)
        self.seeds = list(seeds)
        self.steps = 0
        self.restart()

    def restart(self) -> None:
        """Forget Adam's moments; V1 does so at the start of each phase [v1]."""
        self.optimizer = torch.optim.Adam([self.images], betas=self.betas)

    def generators(self) -> List[torch.Generator]:
        """Fresh sources of each image's draws in the next step, on the CPU."""
        return [torch.Generator().manual_seed(derived_seed(seed, self.steps))
                for seed in self.seeds]

    def step(self, gradient: Tensor, lr: float) -> None:
        """Take one step.

        Args:
            gradient (Tensor): Of the loss, the shape of the images.
            lr (float): Learning rate.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        self.images.grad = gradient
        self.optimizer.step()
        self.images.grad = None
        self.steps += 1
        with torch.no_grad():
            self.images.copy_(torch.minimum(torch.maximum(self.images, self.lower), self.upper))

    def state_dict(self) -> Dict[str, Any]:
        """Images, moments and what random numbers come from: a copy."""
        return dict(images=self.images.detach().clone().cpu(), seeds=list(self.seeds),
                    steps=self.steps, optimizer=copy.deepcopy(self.optimizer.state_dict()))

    @classmethod
    def restored(cls, state: Dict[str, Any], lower: Tensor, upper: Tensor,
                 betas: Sequence[float]) -> 'PixelDescent':
        """Continue from :meth:`state_dict`; the rest as when made anew."""
        pixels = cls(state['images'], state['seeds'], lower, upper, betas)
        pixels.steps = state['steps']
        pixels.optimizer.load_state_dict(copy.deepcopy(state['optimizer']))
        return pixels

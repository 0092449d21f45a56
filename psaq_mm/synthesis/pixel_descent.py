# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Adam on a batch of images that stay valid."""
import copy
from typing import Any, Dict, Sequence

import torch
from torch import Tensor


class PixelDescent:
    """A batch of images, moved by Adam and clamped to valid pixels [v1].

    Args:
        images (Tensor): Normalized images of shape (B, C, H, W) to start from.
        lower (Tensor): Smallest valid pixels, shape (1, C, 1, 1); the images
            live on its device.
        upper (Tensor): Largest valid pixels, same shape.
        betas (Sequence[float]): Adam's.
    """

    def __init__(self, images: Tensor, lower: Tensor, upper: Tensor,
                 betas: Sequence[float]) -> None:
        self.lower, self.upper = lower, upper
        self.betas = (betas[0], betas[1])
        self.images = images.detach().clone().to(lower.device).requires_grad_(True)
        self.restart()

    def restart(self) -> None:
        """Forget Adam's moments; V1 does so at the start of each phase [v1]."""
        self.optimizer = torch.optim.Adam([self.images], betas=self.betas)

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
        with torch.no_grad():
            self.images.copy_(torch.minimum(torch.maximum(self.images, self.lower), self.upper))

    def state_dict(self) -> Dict[str, Any]:
        """Images and moments: a copy, on the CPU where tensors are the images."""
        return dict(images=self.images.detach().clone().cpu(),
                    optimizer=copy.deepcopy(self.optimizer.state_dict()))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        with torch.no_grad():
            self.images.copy_(state['images'])
        self.optimizer.load_state_dict(copy.deepcopy(state['optimizer']))

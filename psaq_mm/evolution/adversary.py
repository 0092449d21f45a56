# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Keep the adversarial pull on the images below the prior's."""
from typing import Optional

import torch
from torch import Tensor


def bounded_factor(prior: Tensor, adversarial: Tensor,
                   fraction: Optional[float]) -> Tensor:
    """Factor of each image's adversarial gradient, at most 1.

    With it, the norm of the adversarial gradient is at most ``fraction`` of
    the norm of the prior's, image by image [choice].

    Args:
        prior (Tensor): Gradient of the prior, shape (B, C, H, W).
        adversarial (Tensor): Gradient of the adversarial term, same shape.
        fraction (float, optional): The bound; None for none.

    Returns:
        Tensor: Shape (B, 1, 1, 1), in [0, 1].
    """
    shape = (len(prior), 1, 1, 1)
    if fraction is None:
        return torch.ones(shape, dtype=prior.dtype, device=prior.device)
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in (prior, adversarial)]
    ratio = fraction * norms[0] / norms[1].clamp(min=torch.finfo(prior.dtype).tiny)
    return ratio.clamp(max=1.).view(shape)

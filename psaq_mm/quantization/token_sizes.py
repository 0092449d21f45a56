# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How large each token is, for scales that follow the tokens."""
from torch import Tensor

SMALLEST = 1e-6
"""Tokens are at least so large: one of zeros stays zeros. float16 holds it."""


def token_sizes(x: Tensor, softmax: bool) -> Tensor:
    """What a quantizer ``per_token`` divides each token by, and multiplies what is rounded by.

    The scale of a token is thus known when it is seen, and not on the calibration images
    [per-token dynamic quantization: ZeroQuant, arXiv 2206.01861, section 4.1]. Which of its sizes
    that is, is our own choice: the root mean square, as one large channel does not change it
    much; and the largest weight of a softmax output, so that what is left is in [0, 1] too.

    Args:
        x (Tensor): Tokens, shape (..., C).
        softmax (bool): Whether they are rows of softmax outputs.

    Returns:
        Tensor: Positive, shape (..., 1), of the type of ``x``.
    """
    values = x.float()
    if softmax:
        sizes = values.amax(-1, keepdim=True).clamp_min(SMALLEST)
    else:  # bounded before the root, whose gradient at 0 is infinite
        sizes = values.square().mean(-1, keepdim=True).clamp_min(SMALLEST**2).sqrt()
    return sizes.to(x.dtype)

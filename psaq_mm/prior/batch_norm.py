# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far a batch's statistics are from those that BatchNorm stores."""
from typing import Tuple

import torch
from torch import Tensor


def channel_statistics(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, as BatchNorm computes them.

    Of an input of shape (B, C, ...): shape (C, ) each, in at least float32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
    return x.mean(1), x.var(1, unbiased=False)


def gaussian_divergence(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor,
                        eps: float = 1e-5) -> Tensor:
    """KL(N(mean, var) || N(running_mean, running_var)) of each channel.

    Zero where the statistics agree, and free of the channel's scale
    [choice; DeepInversion takes the L2 distance of both (peer)]. ``eps`` is added to both
    variances, as BatchNorm does. All are of shape (C, ), and so is the result, in nats.
    """
    var, running_var = var + eps, running_var + eps
    ratio = var / running_var
    return 0.5 * (ratio - 1 - torch.log(ratio) + (mean - running_mean).pow(2) / running_var)

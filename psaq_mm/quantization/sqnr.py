# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Signal to quantization noise ratio."""
import math

from torch import Tensor


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """``10 log10(sum reference^2 / sum (reference - approximation)^2)``.

    Returns:
        float: Decibel; inf where both are equal, -inf where only the
        reference is zero.
    """
    return decibel(float(reference.double().pow(2).sum()),
                   float((reference.double() - approximation.double()).pow(2).sum()))


def decibel(signal: float, noise: float) -> float:
    """Decibel of a ratio of powers; inf without noise, -inf with noise alone."""
    if noise == 0.:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0. else -math.inf

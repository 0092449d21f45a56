# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Random numbers of each image for itself, whatever it is made together with.

All draws are on the CPU, so a seed gives the same numbers on any device.
"""
from typing import Sequence

import numpy as np
import torch
from torch import Tensor


def derived_seed(seed: int, index: int) -> int:
    """Seed of one of many streams of random numbers, such as those of an image.

    NumPy's seeds of parallel streams: neither neighbouring seeds nor
    neighbouring indices have anything in common.

    Args:
        seed (int): What all of them come from.
        index (int): Which of them, from 0.

    Returns:
        int: In [0, 2^64).
    """
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(index, ))
    return int(sequence.generate_state(1, np.uint64)[0])


def uniform(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """Draw numbers uniformly from [0, 1).

    Args:
        generators (Sequence[torch.Generator]): One for each image, on the CPU.
        count (int): Numbers for each.

    Returns:
        Tensor: Float64, with shape of (B, count), on the CPU.
    """
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64)
                        for generator in generators])

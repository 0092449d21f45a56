# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Random numbers of each image for itself, whatever it is made together with.

All draws are on the CPU, so a seed gives the same numbers on any device.
"""
from typing import Sequence

import numpy as np
import torch
from torch import Tensor


def derived_seed(seed: int, index: int) -> int:
    """Seed, in [0, 2^64), of one of many streams of random numbers, such as those of an image.

    NumPy's seeds of parallel streams: neither neighbouring seeds nor
    neighbouring indices, from 0, have anything in common.
    """
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(index, ))
    return int(sequence.generate_state(1, np.uint64)[0])


def uniform(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """Draw numbers from [0, 1) by each generator: float64, shape (B, count), on the CPU."""
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64)
                        for generator in generators])

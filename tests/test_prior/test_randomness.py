# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Streams of random numbers that have nothing in common."""
import numpy as np
import pytest
import torch
from scipy.stats import kstest

from psaq_mm.prior import derived_seed, uniform


def test_seeds_are_those_of_numpys_parallel_streams():
    for seed in (0, 7, 2**63 + 5):
        spawned = np.random.SeedSequence(seed).spawn(4)
        for index, sequence in enumerate(spawned):
            assert derived_seed(seed, index) == sequence.generate_state(1, np.uint64)[0]
    assert derived_seed(-1, 3) == derived_seed(2**64 - 1, 3)  # as torch counts


def test_neighbours_share_nothing():
    """Neither does a stream of a stream: seed + index would."""
    seeds = [derived_seed(seed, index) for seed in range(40) for index in range(40)]
    seeds += [derived_seed(image, step) for image in seeds[:40] for step in range(40)]
    assert len(set(seeds)) == len(seeds) == 3200
    assert len({seed % 2**32 for seed in seeds}) > 3190  # what torch's generator makes use of
    bits = np.array([[seed >> bit & 1 for bit in range(64)] for seed in seeds])
    assert abs(bits.mean(0) - 0.5).max() < 0.05


def test_uniform():
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    draws = uniform(generators, 5)
    assert draws.shape == (3, 5) and draws.dtype == torch.float64
    for seed, row in enumerate(draws):
        alone = uniform([torch.Generator().manual_seed(seed)], 5)[0]
        assert torch.equal(row, alone)
    assert not torch.equal(uniform(generators, 5), draws)  # the next ones
    numbers = uniform([torch.Generator().manual_seed(derived_seed(0, i)) for i in range(999)], 1)
    assert kstest(numbers[:, 0].numpy(), 'uniform').pvalue > 0.01


@pytest.mark.parametrize('default', [torch.float32, torch.float64])
def test_draws_do_not_depend_on_the_default_dtype(default):
    expected = uniform([torch.Generator().manual_seed(1)], 2)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(uniform([torch.Generator().manual_seed(1)], 2), expected)
    finally:
        torch.set_default_dtype(torch.float32)

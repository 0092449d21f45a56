# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import pytest
import torch

from psaq_mm.quantization import excess_width


def test_by_hand():
    """Widths 1, 2, 2, 3 and 20 with a median of 2: at most 3 are allowed."""
    found = excess_width(torch.tensor([1., 4., 4., 9., 400.]), 1.5)
    assert torch.equal(found, torch.tensor([1., 1., 1., 1., 6.6875]))  # 20 / 3 = 106.67 / 16


def test_none_is_left_beyond_the_limit():
    generator = torch.Generator().manual_seed(0)
    for limit in (1., 1.5, 4.):
        width = torch.randn(100, generator=generator).mul(2).exp()
        factor = excess_width(width.square(), limit)
        allowed = limit * width.median()
        wide = width > allowed
        assert wide.any() and not wide.all()
        assert (factor[~wide] == 1).all() and (factor[wide] > 1).all()
        left = (width / factor)[wide]
        assert (left <= allowed * (1 + 1e-6)).all()
        assert (left > allowed * 16 / 17).all()  # no more than a step of 1/16 below
        assert torch.equal(factor * 16, (factor * 16).round())


def test_the_unit_does_not_matter():
    squares = torch.rand(50, generator=torch.Generator().manual_seed(1)) ** 4
    assert torch.equal(excess_width(squares, 1.5), excess_width(squares * 2. ** 20, 1.5))


@pytest.mark.parametrize('squares', [[0., 0., 0., 5.], [float('nan')] * 3,
                                     [1., float('inf'), float('inf')]])
def test_without_a_median_nothing_is_wide(squares):
    assert torch.equal(excess_width(torch.tensor(squares), 1.5), torch.ones(len(squares)))

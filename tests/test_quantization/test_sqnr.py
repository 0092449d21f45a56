# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Signal to quantization noise ratio."""
import math

import pytest
import torch

from psaq_mm.quantization import QuantSpec, fake_quantize, scale_and_zero_point, sqnr_db


def test_by_hand():
    # 25 / 1
    ratio = sqnr_db(torch.tensor([3., 4.]), torch.tensor([3., 3.]))
    assert ratio == pytest.approx(13.9794, abs=1e-4)
    # 100 / 0.01
    ratio = sqnr_db(torch.tensor([[10.]]), torch.tensor([[10.1]]))
    assert ratio == pytest.approx(40., abs=1e-4)
    # noise as large as the signal
    assert sqnr_db(torch.tensor([1., -1.]), torch.zeros(2)) == 0.


def test_equal_and_zero():
    x = torch.randn(5)
    assert sqnr_db(x, x.clone()) == math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


def test_half_precision_does_not_overflow():
    x = torch.full((100, ), 6e4, dtype=torch.float16)
    assert sqnr_db(x, x / 2) == pytest.approx(6.0206, abs=1e-3)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [4, 6, 8])
def test_gaussian(bits, symmetric):
    x = torch.randn(100000, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits, symmetric)
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), spec)
    ratio = sqnr_db(x, fake_quantize(x, scale, zero_point, spec.integer_range))
    # Rounding noise is uniform: a twelfth of the squared step.
    assert ratio == pytest.approx(10 * math.log10(12 / scale.item()**2), abs=0.1)
    if bits == 8:
        assert 35 <= ratio <= 45

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Convolutions of patches as linear layers."""
import pytest
import torch
from conftest import calibrated_op
from torch import nn

from psaq_mm.deploy.export_forms import patches_linear
from psaq_mm.ops import QuantConv2d
from psaq_mm.quantization import QuantSpec


def rows_of(x, kernel):
    """Patches as nn.Unfold lays them out: channels first."""
    return nn.functional.unfold(x, kernel, stride=kernel).transpose(1, 2)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('specs', [None, dict(
    weight=QuantSpec(granularity='per_channel'), input=QuantSpec(symmetric=False),
    output=QuantSpec(symmetric=False)), dict(weight=QuantSpec(symmetric=False))], ids=str)
def test_patches(bias, specs):
    conv, x = nn.Conv2d(3, 8, (4, 2), (4, 2), bias=bias), torch.randn(2, 3, 12, 10)
    if specs is not None:
        conv = calibrated_op(QuantConv2d.from_float(conv, specs), x)
    expected = conv(x).flatten(2).transpose(1, 2)
    linear = patches_linear(conv)
    assert isinstance(linear, nn.Linear)
    got = linear(rows_of(x, (4, 2)))
    if specs is None or 'output' not in specs:
        assert torch.allclose(got, expected, atol=1e-5)
    else:  # a value between two integers may fall to either
        step = float(conv.quantizers['output'].scale)
        assert (got - expected).abs().max() <= step * 1.001
    if specs is not None:
        for role in specs:
            assert torch.equal(linear.quantizers[role].scale, conv.quantizers[role].scale)
        assert torch.equal(
            linear.quantizers['weight'].to_integers(linear.weight),
            conv.quantizers['weight'].to_integers(conv.weight).flatten(1))

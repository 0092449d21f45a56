# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Weights and whole layers as operators: the values of the simulation."""
import pytest
import torch
from conftest import calibrated_op
from torch import nn

from psaq_mm.deploy.exportable_ops import linear_of_patches, make_exportable, split_linear
from psaq_mm.deploy.exportable_quantizer import ExportableWeight
from psaq_mm.ops import QuantConv2d, QuantLinear
from psaq_mm.quantization import QuantSpec


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('granularity', ['per_tensor', 'per_channel'])
@pytest.mark.parametrize('bits', [4, 8])
def test_weight(symmetric, granularity, bits):
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity)
    op = calibrated_op(QuantLinear.from_float(nn.Linear(5, 4), dict(weight=spec)),
                       torch.randn(2, 5))
    form = ExportableWeight(op, 'fc', as_matrix=True)
    assert form.integers.dtype == (torch.int8 if symmetric else torch.uint8)
    assert torch.equal(form.integers.int(), op.weight_quantizer.to_integers(op.weight).t())
    assert torch.equal(form().t(), op.quantized_weight())


SPECS = dict(weight=QuantSpec(granularity='per_channel'), input=QuantSpec(symmetric=False),
             output=QuantSpec(symmetric=False))


@pytest.mark.parametrize('target', ['onnx', 'openvino'])
def test_ops(target):
    """A whole layer, linear or not, with and without some roles."""
    for layer, kind, x in ((nn.Linear(6, 4), QuantLinear, torch.randn(2, 5, 6)),
                           (nn.Linear(6, 4, bias=False), QuantLinear, torch.randn(2, 5, 6)),
                           (nn.Conv2d(3, 4, 3), QuantConv2d, torch.randn(2, 3, 8, 8))):
        model = nn.Sequential(calibrated_op(kind.from_float(layer, SPECS), x))
        expected = model(x)
        step = float(model[0].quantizers['output'].scale)
        make_exportable(model, target)
        assert (model(x) - expected).abs().max() <= step * 1.001
    model = nn.Sequential(calibrated_op(QuantLinear.from_float(nn.Linear(6, 4), SPECS),
                                        torch.randn(2, 5, 6)))
    x, layer = torch.randn(2, 5, 6), model[0].float_module
    make_exportable(model, target, float_roles=('weight', 'input', 'output'))
    assert torch.allclose(model(x), layer(x), atol=1e-6)


@pytest.mark.parametrize('granularity', ['per_tensor', 'per_channel'])
def test_split(granularity):
    """The parts of qkv have the integers and scales of the whole."""
    specs = {**SPECS, 'output': QuantSpec(symmetric=False, granularity=granularity)}
    x = torch.randn(2, 5, 6)
    op = calibrated_op(QuantLinear.from_float(nn.Linear(6, 12), specs), x)
    parts = split_linear(op, 3)
    inside = op.quantize('input', x)
    assert torch.equal(torch.cat([part(inside) for part in parts], -1), op(x))
    assert torch.equal(torch.cat([p.quantizers['weight'].scale for p in parts]),
                       op.quantizers['weight'].scale)
    layers = split_linear(op.float_module, 3)
    assert torch.allclose(torch.cat([layer(x) for layer in layers], -1), op.float_module(x))


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
    linear = linear_of_patches(conv)
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

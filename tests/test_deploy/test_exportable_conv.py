# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Convolutions as products of matrices: the values of the simulation."""
import pytest
import torch
from conftest import calibrated_op
from mmcv.cnn import ConvModule
from torch import nn

from psaq_mm.deploy.exportable_conv import is_matrix_product
from psaq_mm.deploy.exportable_ops import make_exportable
from psaq_mm.ops import QuantConv2d
from psaq_mm.quantization import QuantSpec

SPECS = dict(weight=QuantSpec(granularity='per_channel'), input=QuantSpec(symmetric=False))


@pytest.mark.parametrize('specs', [
    SPECS, dict(SPECS, output=QuantSpec(symmetric=False)), dict(SPECS, input=QuantSpec()),
    dict(SPECS, weight=QuantSpec(symmetric=False)),
    dict(weight=QuantSpec(bits=4), input=QuantSpec(bits=4, symmetric=False))], ids=str)
@pytest.mark.parametrize('options', [
    dict(kernel_size=1), dict(kernel_size=1, stride=2, bias=False), dict(kernel_size=3, padding=1),
    dict(kernel_size=3), dict(kernel_size=3, padding=2, dilation=2),
    dict(kernel_size=(3, 1), padding=(1, 0), stride=(2, 3)),
    dict(kernel_size=(2, 5), padding=(1, 3), stride=3, dilation=(3, 1))], ids=str)
def test_convolution(specs, options):
    """Inputs are such that 0, what padding holds, is not the smallest integer."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 11, 14)
    op = calibrated_op(QuantConv2d.from_float(nn.Conv2d(16, 6, **options), specs), x)
    expected, model = op(x), nn.Sequential(op)
    make_exportable(model, 'onnx')
    assert 'forward' in op.__dict__
    got = model(x)
    assert got.shape == expected.shape
    if 'output' not in specs:
        assert torch.allclose(got, expected, atol=1e-4)
    else:  # a value between two integers may fall to either
        step = float(op.quantizers['output'].scale)
        assert (got - expected).abs().max() <= step * 1.001
        assert ((got - expected).abs() > step / 2).float().mean() < 0.01


@pytest.mark.parametrize('layer, specs', [
    (nn.Conv2d(16, 16, 3, groups=2), SPECS), (nn.Conv2d(3, 16, 4, stride=4), SPECS),
    (nn.Conv2d(16, 4, 3, padding='same'), SPECS),
    (nn.Conv2d(16, 4, 3, padding=1, padding_mode='circular'), SPECS),
    (nn.Conv2d(16, 4, 3), dict(weight=SPECS['weight']))], ids=str)
def test_others_stay_convolutions(layer, specs):
    x = torch.randn(1, layer.in_channels, 12, 12)
    op = calibrated_op(QuantConv2d.from_float(layer, specs), x)
    expected, model = op(x), nn.Sequential(op)
    make_exportable(model, 'onnx')
    assert not is_matrix_product(op) and 'forward' not in op.__dict__
    assert torch.allclose(model(x), expected, atol=1e-4)


def test_openvino_has_convolutions_of_its_own():
    x = torch.randn(1, 16, 8, 8)
    op = calibrated_op(QuantConv2d.from_float(nn.Conv2d(16, 4, 3), SPECS), x)
    expected, model = op(x), nn.Sequential(op)
    make_exportable(model, 'openvino')
    assert 'forward' not in op.__dict__
    assert torch.allclose(model(x), expected, atol=1e-4)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('specs', [SPECS, dict(SPECS, output=QuantSpec(symmetric=False)),
                                   dict(weight=SPECS['weight'])], ids=str)
def test_batch_norm_is_taken_in(specs, bias):
    """Where the convolution is a product of matrices without a quantized output."""
    torch.manual_seed(0)
    module = ConvModule(16, 6, 3, padding=1, norm_cfg=dict(type='BN'), bias=bias).eval()
    with torch.no_grad():
        for values in (module.bn.weight, module.bn.bias, module.bn.running_mean):
            values.normal_()
        module.bn.running_var.uniform_(0.5, 2.)
    assert module.bn.weight.min() < 0 < module.bn.weight.max()
    x = torch.randn(2, 16, 9, 8)
    module.conv = calibrated_op(QuantConv2d.from_float(module.conv, specs), x)
    expected = module(x)
    make_exportable(module, 'onnx')
    assert isinstance(module.norm, nn.Identity) == (specs is SPECS)
    if 'output' not in specs:
        assert torch.allclose(module(x), expected, atol=1e-4)


def test_a_convolution_with_several_batch_norms():
    """RTMDet's levels share convolutions: each BatchNorm is folded for its own level."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 9, 8)
    levels = nn.ModuleList(ConvModule(16, 6, 3, norm_cfg=dict(type='BN')) for _ in range(3))
    shared = calibrated_op(QuantConv2d.from_float(levels[0].conv, SPECS), x)
    for level in levels:
        level.conv = shared
        nn.init.normal_(level.bn.weight)
        nn.init.normal_(level.bn.bias)
    levels.append(nn.Sequential(shared))  # and once without a BatchNorm
    levels.eval()
    expected = [level(x) for level in levels]
    make_exportable(levels, 'onnx')
    assert all(isinstance(level.norm, nn.Identity) for level in levels[:3])
    for level, one in zip(levels, expected):
        assert torch.allclose(level(x), one, atol=1e-4)

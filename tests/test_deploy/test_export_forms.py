# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantizers as operators: the values of the simulation."""
import pytest
import torch
from conftest import calibrated_op
from torch import nn

from psaq_mm.deploy.export_forms import (
    ActivationForm,
    FakeQuantizeForm,
    RoundForm,
    WeightForm,
    split_linear,
    use_export_forms,
)
from psaq_mm.errors import UserError
from psaq_mm.ops import QuantConv2d, QuantLinear
from psaq_mm.quantization import Quantizer, QuantSpec


def quantizer(low, high, **spec):
    made = Quantizer(QuantSpec(**spec), channel_axis=1)
    made.set_range(torch.tensor(low).reshape(-1), torch.tensor(high).reshape(-1))
    made.enabled = True
    return made


@pytest.mark.parametrize('form', [ActivationForm, FakeQuantizeForm, RoundForm])
@pytest.mark.parametrize('bits', [2, 4, 6, 8])
@pytest.mark.parametrize('symmetric', [False, True])
def test_activation(form, bits, symmetric):
    """All integers, values between them, and values far outside of the range."""
    source = quantizer([-1.3], [2.9], bits=bits, symmetric=symmetric)
    x = torch.cat([torch.linspace(-9, 9, 999), torch.tensor([0., 1e6, -1e6])])
    step = float(source.scale)
    difference = (form(source, 'x')(x) - source(x)).abs()
    # A value halfway between two integers may fall to either.
    assert (difference > 1e-5 * step * 2**bits).float().mean() < 0.003
    assert difference.max() <= step * 1.001


def test_rounded_operands():
    """Their integers are those of the quantizer less its zero point, exactly."""
    source = quantizer([-1.3], [2.9], bits=8, symmetric=False)
    x = torch.randn(999) * 2
    form = RoundForm(source, 'x')
    expected = source.to_integers(x / 4) - source.zero_point
    assert ((form.integers(x, 0.25) - expected).abs() > 0).float().mean() < 0.003
    assert form.integers(x).min() == -source.zero_point and torch.equal(
        form.integers(x) * form.step, form(x))


def test_several_ranges():
    source = quantizer([-1., 0.], [1., 2.], granularity='per_channel')
    with pytest.raises(UserError, match=r'fc .* per channel.*per_tensor'):
        ActivationForm(source, 'fc (input)')


def test_learned_zero_point_is_rounded():
    source = quantizer([-1.], [1.], bits=8, symmetric=False)
    rounded = int(source.zero_point)
    source.zero_point += 0.4
    form = ActivationForm(source, 'x')
    assert form.zero_point.dtype == torch.uint8 and int(form.zero_point) == rounded
    assert torch.equal(form.scale, source.scale)


@pytest.mark.parametrize('change, word', [(dict(zero_point=-3.), 'zero point'),
                                          (dict(scale=-1.), 'not positive')])
def test_ranges_that_fit_no_engine(change, word):
    source = quantizer([-1.], [1.], bits=8, symmetric=False)
    for name, value in change.items():
        getattr(source, name).fill_(value)
    with pytest.raises(UserError, match=f'(?s)stages.0.*{word}'):
        ActivationForm(source, 'stages.0')


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('granularity', ['per_tensor', 'per_channel'])
@pytest.mark.parametrize('bits', [4, 8])
def test_weight(symmetric, granularity, bits):
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity)
    op = calibrated_op(QuantLinear.from_float(nn.Linear(5, 4), dict(weight=spec)),
                       torch.randn(2, 5))
    form = WeightForm(op, 'fc', transposed=True)
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
        use_export_forms(model, target)
        assert (model(x) - expected).abs().max() <= step * 1.001
    model = nn.Sequential(calibrated_op(QuantLinear.from_float(nn.Linear(6, 4), SPECS),
                                        torch.randn(2, 5, 6)))
    x, layer = torch.randn(2, 5, 6), model[0].float_module
    use_export_forms(model, target, float_roles=('weight', 'input', 'output'))
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

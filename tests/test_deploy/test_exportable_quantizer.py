# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantizers of activations as operators: the values of the simulation."""
import pytest
import torch

from psaq_mm.deploy.exportable_quantizer import (
    ExportableFakeQuantize,
    ExportableQuantizer,
    ExportableRounding,
    ExportableTokens,
)
from psaq_mm.errors import UserError
from psaq_mm.quantization import Quantizer, QuantSpec


def quantizer(low, high, **spec):
    made = Quantizer(QuantSpec(**spec), channel_axis=1)
    made.set_range(torch.tensor(low).reshape(-1), torch.tensor(high).reshape(-1))
    made.enabled = True
    return made


@pytest.mark.parametrize('form', [ExportableQuantizer, ExportableFakeQuantize, ExportableRounding])
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


@pytest.mark.parametrize('form', [ExportableQuantizer, ExportableFakeQuantize, ExportableRounding])
@pytest.mark.parametrize('softmax', [False, True])
def test_scales_of_tokens(form, softmax):
    torch.manual_seed(0)
    source = quantizer([0. if softmax else -1.3], [0.8 if softmax else 1.9], bits=3,
                       symmetric=False, granularity='per_token')
    source.softmax = softmax
    x = torch.randn(50, 40) * torch.logspace(-2, 2, 50)[:, None]
    x = x.softmax(-1) if softmax else x
    x[0] = 0  # padding
    found, expected = ExportableTokens(form(source, 'x'), softmax)(x), source(x)
    near = (found - expected).abs() <= 1e-5 * x.abs().amax(-1, keepdim=True)
    assert near.float().mean() > 0.997 and torch.equal(found[0], torch.zeros(40))


def test_rounded_operands():
    """Their integers are those of the quantizer less its zero point, exactly."""
    source = quantizer([-1.3], [2.9], bits=8, symmetric=False)
    x = torch.randn(999) * 2
    form = ExportableRounding(source, 'x')
    expected = source.to_integers(x / 4) - source.zero_point
    assert ((form.integers(x, 0.25) - expected).abs() > 0).float().mean() < 0.003
    assert form.integers(x).min() == -source.zero_point and torch.equal(
        form.integers(x) * form.step, form(x))


def test_several_ranges():
    source = quantizer([-1., 0.], [1., 2.], granularity='per_channel')
    with pytest.raises(UserError, match=r'fc .* per channel.*per_tensor'):
        ExportableQuantizer(source, 'fc (input)')


def test_learned_zero_point_is_rounded():
    source = quantizer([-1.], [1.], bits=8, symmetric=False)
    rounded = int(source.zero_point)
    source.zero_point += 0.4
    form = ExportableQuantizer(source, 'x')
    assert form.zero_point.dtype == torch.uint8 and int(form.zero_point) == rounded
    assert torch.equal(form.scale, source.scale)


@pytest.mark.parametrize('change, word', [(dict(zero_point=-3.), 'zero_point'),
                                          (dict(scale=-1.), 'scale is not above 0')])
def test_ranges_that_fit_no_engine(change, word):
    source = quantizer([-1.], [1.], bits=8, symmetric=False)
    for name, value in change.items():
        getattr(source, name).fill_(value)
    with pytest.raises(UserError, match=f'(?s)stages.0.*{word}'):
        ExportableQuantizer(source, 'stages.0')

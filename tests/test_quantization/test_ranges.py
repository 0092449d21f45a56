# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Scale and zero point of a range."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.quantization import QuantSpec, fake_quantize, scale_and_zero_point

HUGE = torch.finfo(torch.float32).max * 0.99


def tensors(*values):
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize('lower, upper, bits, scale, zero_point', [
    (-1., 2., 2, 1., 1.),
    (0., 15., 4, 1., 0.),
    (-7.5, 0., 4, 0.5, 15.),
    (2., 30., 4, 2., 0.),  # widened to hold 0
    (-30., -2., 4, 2., 15.),
    (-1.2, 1.35, 8, 0.01, 120.),
    (-0.4, 2.6, 2, 1., 0.),  # the zero point rounds: 0.4 -> 0
])
def test_asymmetric_by_hand(lower, upper, bits, scale, zero_point):
    result = scale_and_zero_point(*tensors(lower, upper), QuantSpec(bits, symmetric=False))
    assert result[0].item() == pytest.approx(scale, rel=1e-6)
    assert result[1].item() == zero_point
    assert result[0].dtype == result[1].dtype == torch.float32


@pytest.mark.parametrize('lower, upper, bits, scale', [
    (-1., 0.5, 2, 1.), (-3.5, 7., 4, 1.), (-7., 3.5, 4, 1.), (1., 254., 8, 2.),
    (-12.7, -1., 8, 0.1)
])
def test_symmetric_by_hand(lower, upper, bits, scale):
    result = scale_and_zero_point(*tensors(lower, upper), QuantSpec(bits, symmetric=True))
    assert result[0].item() == pytest.approx(scale, rel=1e-6)
    assert result[1].item() == 0.


def test_each_channel_by_itself():
    lower, upper = tensors([-1., 0., -15., 0.], [2., 3., -3., 0.])
    scale, zero_point = scale_and_zero_point(lower, upper, QuantSpec(2, symmetric=False))
    assert scale.tolist() == [1., 1., 5., 1.]
    assert zero_point.tolist() == [1., 0., 3., 0.]
    scale, zero_point = scale_and_zero_point(lower, upper, QuantSpec(2, symmetric=True))
    assert scale.tolist() == [2., 3., 15., 1.]
    assert zero_point.tolist() == [0., 0., 0., 0.]


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('shape', [(), (1, ), (5, )])
def test_shape_is_kept(shape, symmetric):
    scale, zero_point = scale_and_zero_point(-torch.ones(shape), torch.ones(shape),
                                             QuantSpec(8, symmetric))
    assert scale.shape == zero_point.shape == shape


@st.composite
def specs_and_ranges(draw):
    spec = QuantSpec(bits=draw(st.integers(2, 8)), symmetric=draw(st.booleans()))
    value = st.one_of(st.floats(-100, 100, width=32), st.floats(-2.**100, 2.**100, width=32))
    return (spec, *tensors(*sorted([draw(value), draw(value)])))


@settings(max_examples=500, deadline=None)
@given(specs_and_ranges())
def test_zero_is_exact_and_ends_are_within_half_a_step(case):
    spec, lower, upper = case
    scale, zero_point = scale_and_zero_point(lower, upper, spec)
    qmin, qmax = spec.integer_range
    assert scale > 0 and scale.isfinite()
    assert qmin <= zero_point <= qmax and zero_point == zero_point.round()
    if spec.symmetric:
        assert zero_point == 0
    zero = torch.zeros(1)
    assert fake_quantize(zero, scale, zero_point, spec.integer_range).item() == 0.
    if max(-lower, upper) < 1e-35:  # may be below what a scale can resolve
        return
    step = scale.double().item()
    low, high = ((end - zero_point.double().item()) * step for end in (qmin, qmax))
    slack = step * (0.5 + 1e-4)
    if spec.symmetric:
        top = max(-lower.item(), upper.item())
        assert low == pytest.approx(-top, abs=step * 1e-4)
        assert high == pytest.approx(top, abs=step * 1e-4)
    else:
        assert abs(low - min(lower.item(), 0.)) <= slack
        assert abs(high - max(upper.item(), 0.)) <= slack


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('symmetric', [True, False])
def test_ends_are_reproduced(bits, symmetric):
    spec = QuantSpec(bits, symmetric)
    for lower, upper in ((-1.7, 1.7), (0., 3.3), (-3.3, 0.), (-0.1, 8.), (-8., 0.1)):
        ends = torch.tensor([lower, upper])
        scale, zero_point = scale_and_zero_point(ends[0], ends[1], spec)
        error = (fake_quantize(ends, scale, zero_point, spec.integer_range) - ends).abs()
        assert error.max() <= scale * (0.5 + 1e-4)


@pytest.mark.parametrize('symmetric', [True, False])
def test_width_0_gets_scale_1(symmetric):
    spec = QuantSpec(8, symmetric)
    scale, zero_point = scale_and_zero_point(*tensors(0., 0.), spec)
    assert (scale.item(), zero_point.item()) == (1., 0.)
    # Not of width 0 once it holds 0.
    scale, _ = scale_and_zero_point(*tensors(2.55, 2.55), spec)
    assert scale.item() == pytest.approx(2.55 / (127 if symmetric else 255))


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, 8])
@pytest.mark.parametrize('lower, upper', [
    (-HUGE, HUGE), (0., HUGE), (-HUGE, 0.), (-1e-45, 1e-45), (0., 1e-40), (-1e-38, 0.)
])
def test_extreme_ranges_have_usable_scales(lower, upper, bits, symmetric):
    spec = QuantSpec(bits, symmetric)
    scale, zero_point = scale_and_zero_point(*tensors(lower, upper), spec)
    assert scale.isfinite() and scale > 0 and scale.reciprocal().isfinite()
    qmin, qmax = spec.integer_range
    assert qmin <= zero_point <= qmax
    for end in (qmin, qmax):
        assert ((end - zero_point) * scale).isfinite()


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_bounds_that_are_not_finite(bad):
    spec = QuantSpec()
    for lower, upper in ((bad, 1.), (-1., bad), ([0., bad], [1., 1.])):
        with pytest.raises(ValueError, match='must be finite'):
            scale_and_zero_point(*tensors(lower, upper), spec)


def test_lower_above_upper():
    with pytest.raises(ValueError, match='exceeds its upper end'):
        scale_and_zero_point(*tensors(1., 0.5), QuantSpec())
    with pytest.raises(ValueError, match='exceeds its upper end'):
        scale_and_zero_point(*tensors([0., 1.], [1., 0.]), QuantSpec())


def test_no_gradient_flows():
    lower = torch.tensor(-1., requires_grad=True)
    scale, zero_point = scale_and_zero_point(lower, -lower, QuantSpec())
    assert not scale.requires_grad
    assert not zero_point.requires_grad

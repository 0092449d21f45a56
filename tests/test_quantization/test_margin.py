# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Room beyond what was observed."""
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.errors import UserError
from psaq_mm.quantization import Quantizer, QuantSpec
from psaq_mm.recipe.quantization import QuantizationSettings


def widened(spec, lower, upper):
    ends = spec.widen(torch.tensor(lower), torch.tensor(upper))
    return tuple(end.tolist() for end in ends)


@pytest.mark.parametrize('bits, margin, factor', [
    (8, 1., 2.), (8, 0.25, 1.25), (4, 1., 1.0625), (2, 1., 1 + 1 / 64), (6, 2, 1.5),
    (4, 16, 2.), (8, 0, 1.)])
def test_by_hand(bits, margin, factor):
    spec = QuantSpec(bits, False, margin=margin)
    assert widened(spec, -3., 5.) == pytest.approx((-3 * factor, 5 * factor))
    assert widened(spec, 0., 5.) == pytest.approx((0., 5 * factor))
    # Ends on one side of 0 move away from it or stay.
    assert widened(spec, 2., 4.) == pytest.approx((2., 4 * factor))
    assert widened(spec, -4., -2.) == pytest.approx((-4 * factor, -2.))


def test_of_each_channel():
    low, high = widened(QuantSpec(8, True, 'per_channel', margin=0.5), [-1., 0., -4.],
                        [2., 3., 0.])
    assert low == [-1.5, 0., -6.] and high == [3., 4.5, 0.]


def test_no_margin_is_the_default():
    lower, upper = torch.tensor([-1.]), torch.tensor([2.])
    spec = QuantSpec(bounds=(-0.5, 1))  # bounds alone change nothing
    assert QuantSpec().margin == 0. and QuantSpec().bounds is None
    assert all(one is other for one, other in zip(spec.widen(lower, upper), (lower, upper)))


@pytest.mark.parametrize('observed, expected', [
    ((0., 0.4), (0., 0.8)), ((0., 0.9), (0., 1.)), ((-0.3, 0.9), (-0.5, 1.)),
    ((-0.2, 0.2), (-0.4, 0.4)), ((0., 1.), (0., 1.)),
    ((-0.7, 1.5), (-0.7, 1.5))])  # more was observed than the bounds hold
def test_bounds_by_hand(observed, expected):
    spec = QuantSpec(8, False, margin=1, bounds=(-0.5, 1))
    assert widened(spec, *observed) == pytest.approx(expected)
    assert spec.bounds == (-0.5, 1.) and all(isinstance(end, float) for end in spec.bounds)


ENDS = st.floats(-1e4, 1e4, width=32)


@given(ends=st.tuples(ENDS, ENDS).map(sorted), bits=st.integers(2, 8), margin=st.floats(0, 1024),
       bounds=st.none() | st.tuples(st.floats(-1e4, 0), st.floats(0, 1e4)))
@settings(deadline=None, max_examples=200)
def test_range_only_grows(ends, bits, margin, bounds):
    low, high = widened(QuantSpec(bits, False, margin=margin, bounds=bounds), *ends)
    assert low <= ends[0] <= ends[1] <= high
    allowed = bounds or (-math.inf, math.inf)
    assert low >= min(allowed[0], ends[0]) - 1e-3
    assert high <= max(allowed[1], ends[1]) + 1e-3


# The quantizer


def observed(spec, values):
    quantizer = Quantizer(spec, 0)
    quantizer.start_observing()
    quantizer(torch.tensor(values))
    quantizer.finish_observing()
    return quantizer


def test_quantizer_uses_it():
    """[-1, 3], doubled, over 255 steps: the zero is at 64 as without."""
    quantizer = observed(QuantSpec(8, False, margin=1), [-1., 0., 3.])
    assert float(quantizer.scale) == pytest.approx(8 / 255)
    assert float(quantizer.zero_point) == 64.
    quantizer.enabled = True
    values = torch.tensor([-2., 5.9, 7.])
    assert quantizer(values).tolist() == pytest.approx(
        [-64 * 8 / 255, 188 * 8 / 255, 191 * 8 / 255], abs=1e-5)


def test_quantizer_keeps_to_the_bounds():
    quantizer = observed(QuantSpec(8, False, margin=1, bounds=(0, 1)), [0., 0.7])
    assert float(quantizer.scale) == pytest.approx(1 / 255)
    assert float(quantizer.zero_point) == 0.


def test_symmetric_channels():
    quantizer = observed(QuantSpec(4, True, 'per_channel', margin=16), [[-1., 0.5], [0., 3.]])
    assert quantizer.scale.tolist() == pytest.approx([2 / 7, 6 / 7])


def test_margin_costs_the_same_step_at_any_width():
    """Widening adds about as much to the step at 8 bits as at 4."""
    added = []
    for bits in (8, 4):
        steps = [float(observed(QuantSpec(bits, False, margin=m), [0., 1.]).scale)
                 for m in (0., 1.)]
        added.append(steps[1] - steps[0])
    assert added[0] == pytest.approx(1 / 255, rel=1e-4)
    assert added[1] == pytest.approx(1 / 16 / 15, rel=1e-4)
    assert added[1] == pytest.approx(added[0], rel=0.1)


# As data


@pytest.mark.parametrize('margin', [-0.1, 1025, float('nan'), float('inf'), '1', None, True, [1]])
def test_bad_margin(margin):
    with pytest.raises(UserError, match='margin must be a number from 0 to 1024, got') as caught:
        QuantSpec(margin=margin)
    assert repr(margin) in str(caught.value)


@pytest.mark.parametrize('bounds', [
    1, (), (1, ), (0, 1, 2), (0.1, 1), (-1, -0.1), (1, 0), ('0', 1), (None, 1), (False, True),
    '01', {0: 0, 1: 1}, (float('nan'), 1), (0, float('nan'))])
def test_bad_bounds(bounds):
    with pytest.raises(UserError, match='bounds must be None or two numbers that hold 0'):
        QuantSpec(bounds=bounds)


def test_round_trip_through_json():
    spec = QuantSpec(5, False, margin=0.5, bounds=[0, 1])
    again = QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and again.bounds == (0., 1.) and again.margin == 0.5
    assert spec != QuantSpec(5, False, margin=0.5)


def test_section_of_a_config():
    settings = QuantizationSettings.from_dict(dict(
        activation=dict(margin=0.5), roles=dict(attention=dict(bounds=(0, 1)))))
    attention, other = (settings.spec_for('x', role) for role in ('attention', 'input'))
    assert (attention.margin, attention.bounds) == (0.5, (0., 1.))
    assert (other.margin, other.bounds) == (0.5, None)
    assert settings.spec_for('x', 'weight').margin == 0.
    with pytest.raises(UserError, match='^quantization.activation.margin must be a number'):
        QuantizationSettings.from_dict(dict(activation=dict(margin=-1)))

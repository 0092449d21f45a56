# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Fake quantization against hand-computed values and torch's own kernels."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.quantization import (
    QuantSpec,
    dequantize,
    fake_quantize,
    quantize_to_integers,
    scale_and_zero_point,
)

ALL_BITS = range(2, 9)


def integer_range(bits, symmetric):
    """Independent of QuantSpec: narrow and signed, or unsigned."""
    return (1 - 2**(bits - 1), 2**(bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def torch_fake_quantize(x, scale, zero_point, integers, axis=None):
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), *integers)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point.to(torch.int32),
                                                  axis % x.dim(), *integers)


def random_case(bits, symmetric, shape, axis=None, seed=0):
    """Values that saturate here and there, with one scale or one per channel."""
    generator = torch.Generator().manual_seed(1000 * bits + 10 * seed + symmetric)
    integers = integer_range(bits, symmetric)
    count = () if axis is None else (shape[axis], )
    scale = torch.exp(torch.randn(count, generator=generator) * 3)
    zero_point = torch.zeros(count)
    if not symmetric:
        zero_point = torch.randint(integers[1] + 1, count, generator=generator).float()
    view = [1] * len(shape)
    if axis is not None:
        view[axis] = -1
    spread = scale.reshape(view) * (integers[1] - integers[0])
    return torch.randn(shape, generator=generator) * spread, scale, zero_point, integers


def three_paths(x, scale, zero_point, integers, axis=None):
    """The result without gradient, with one on x, and with one on the range."""
    with torch.no_grad():
        plain = fake_quantize(x, scale, zero_point, integers, axis)
    fixed = fake_quantize(x.clone().requires_grad_(), scale, zero_point, integers, axis)
    learnable = fake_quantize(x, scale.clone().requires_grad_(),
                              zero_point.clone().requires_grad_(), integers, axis)
    assert not plain.requires_grad
    assert fixed.requires_grad
    assert learnable.requires_grad
    return plain, fixed.detach(), learnable.detach()


# Values by hand

def test_symmetric_by_hand():
    x = torch.tensor([-9., -3.5, -1.3, -0.24, 0., 0.26, 1.25, 1.26, 3.4, 9.])
    # 4 bits are -7..7; steps of 0.5; 1.25 is the tie 2.5 -> 2.
    expected = [-3.5, -3.5, -1.5, 0., 0., 0.5, 1., 1.5, 3.5, 3.5]
    for y in three_paths(x, torch.tensor(0.5), torch.tensor(0.), (-7, 7)):
        assert y.tolist() == expected


def test_asymmetric_by_hand():
    x = torch.tensor([-5., -1.6, -1.4, 0., 0.9, 12.4, 12.6, 20.])
    # 4 bits are 0..15; zero point 3, so -3..12 in steps of 1.
    expected = [-3., -2., -1., 0., 1., 12., 12., 12.]
    for y in three_paths(x, torch.tensor(1.), torch.tensor(3.), (0, 15)):
        assert y.tolist() == expected
    integers = quantize_to_integers(x, torch.tensor(1.), torch.tensor(3.), (0, 15))
    assert integers.tolist() == [0, 1, 2, 3, 4, 15, 15, 15]


def test_two_bits_by_hand():
    x = torch.tensor([-3., -0.51, -0.5, 0.2, 0.5, 0.51, 3.])
    for y in three_paths(x, torch.tensor(1.), torch.tensor(0.), (-1, 1)):
        assert y.tolist() == [-1., -1., 0., 0., 0., 1., 1.]
    for y in three_paths(x, torch.tensor(1.), torch.tensor(1.), (0, 3)):
        assert y.tolist() == [-1., -1., 0., 0., 0., 1., 2.]


def test_per_channel_on_axis_0():
    x = torch.tensor([[1., 2.4, -9.], [1., 2.4, -9.]])
    scale, zero_point = torch.tensor([1., 4.]), torch.tensor([0., 0.])
    for y in three_paths(x, scale, zero_point, (-7, 7), 0):
        assert y.tolist() == [[1., 2., -7.], [0., 4., -8.]]


def test_per_channel_on_the_last_axis():
    x = torch.tensor([[[1.2, -1.2, 5.]], [[9., -9., -5.]]])  # (2, 1, 3)
    scale, zero_point = torch.tensor([1., 0.5, 2.]), torch.tensor([0., 3., 2.])
    # 2 bits are 0..3: steps 0..3, -3..0 and -2..1 of each channel's scale.
    expected = [[[1., -1., 2.]], [[3., -1.5, -4.]]]
    for axis in (-1, 2):
        for y in three_paths(x, scale, zero_point, (0, 3), axis):
            assert y.tolist() == expected


def test_ties_go_to_even():
    steps = torch.arange(-20, 21) + 0.5
    even = torch.tensor([2. * math.floor((step + 1) / 2) for step in steps.tolist()])
    for scale in (0.25, 1., 8.):  # powers of 2, so that all are exact ties
        for y in three_paths(steps * scale, torch.tensor(scale), torch.tensor(0.), (-127, 127)):
            assert torch.equal(y, even * scale)


# torch's own kernels

@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', ALL_BITS)
def test_equals_torch_per_tensor(bits, symmetric):
    for seed in range(5):
        x, scale, zero_point, integers = random_case(bits, symmetric, (7, 5, 31), seed=seed)
        expected = torch_fake_quantize(x, scale, zero_point, integers)
        for y in three_paths(x, scale, zero_point, integers):
            assert torch.equal(y, expected)


@pytest.mark.parametrize('axis', [0, 1, -1])
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', ALL_BITS)
def test_equals_torch_per_channel(bits, symmetric, axis):
    x, scale, zero_point, integers = random_case(bits, symmetric, (6, 9, 4, 5), axis)
    expected = torch_fake_quantize(x, scale, zero_point, integers, axis)
    for y in three_paths(x, scale, zero_point, integers, axis):
        assert torch.equal(y, expected)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', ALL_BITS)
def test_equals_torch_on_ties_and_next_to_them(bits, symmetric):
    integers = integer_range(bits, symmetric)
    zero_point = torch.tensor(0. if symmetric else 2.)
    halves = torch.arange(2 * integers[0] - 6, 2 * integers[1] + 7) / 2
    for scale in (0.5, 0.1, 3.7):
        ties = halves * scale
        up = torch.full_like(ties, math.inf)
        x = torch.cat([ties, torch.nextafter(ties, up), torch.nextafter(ties, -up)])
        expected = torch_fake_quantize(x, scale, zero_point, integers)
        for y in three_paths(x, torch.tensor(scale), zero_point, integers):
            assert torch.equal(y, expected)


# Properties

@st.composite
def ranges_and_values(draw):
    spec = QuantSpec(bits=draw(st.integers(2, 8)), symmetric=draw(st.booleans()))
    ends = st.floats(0, 1e4, width=32)
    scale, zero_point = scale_and_zero_point(-torch.tensor(draw(ends)), torch.tensor(draw(ends)),
                                             spec)
    values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20)
    return torch.tensor(draw(values)), scale, zero_point, spec.integer_range


@settings(max_examples=300, deadline=None)
@given(ranges_and_values())
def test_error_grid_and_idempotence(case):
    x, scale, zero_point, integers = case
    y = fake_quantize(x, scale, zero_point, integers)
    step = scale.double()
    low, high = ((end - zero_point.double()) * step for end in integers)
    error = (y.double() - x.double().clamp(low, high)).abs()
    assert (error <= step / 2 + 1e-6 * x.double().abs() + 1e-6 * step).all()
    steps = (y.double() / step).round()
    assert torch.equal(y, (steps * step).float())
    assert (steps + zero_point >= integers[0]).all()
    assert (steps + zero_point <= integers[1]).all()
    assert torch.equal(fake_quantize(y, scale, zero_point, integers), y)


@settings(max_examples=100, deadline=None)
@given(ranges_and_values())
def test_integers_and_back(case):
    x, scale, zero_point, integers = case
    q = quantize_to_integers(x, scale, zero_point, integers)
    assert q.dtype == torch.int32
    assert integers[0] <= q.min() and q.max() <= integers[1]
    assert torch.equal(dequantize(q, scale, zero_point),
                       fake_quantize(x, scale, zero_point, integers))


@pytest.mark.parametrize('axis', [0, -1])
@pytest.mark.parametrize('symmetric', [True, False])
def test_integers_and_back_per_channel(symmetric, axis):
    x, scale, zero_point, integers = random_case(5, symmetric, (6, 9, 60), axis)
    q = quantize_to_integers(x, scale, zero_point, integers, axis)
    assert torch.equal(dequantize(q, scale, zero_point, axis),
                       fake_quantize(x, scale, zero_point, integers, axis))
    # All integers are hit: the test would see a wrong end of the range.
    assert sorted(q.unique().tolist()) == list(range(integers[0], integers[1] + 1))


# Special inputs

@pytest.mark.parametrize('shape', [(), (1, ), (3, 0, 2), (0, )])
def test_zero_one_element_and_empty(shape):
    for zero_point in (0., 5.):
        for y in three_paths(torch.zeros(shape), torch.tensor(0.3), torch.tensor(zero_point),
                             (0, 15)):
            assert y.shape == shape
            assert torch.equal(y, torch.zeros(shape))
    x = torch.full(shape, 0.7)
    for y in three_paths(x, torch.tensor(0.25), torch.tensor(5.), (0, 15)):
        assert torch.equal(y, torch.full(shape, 0.75))


def test_empty_per_channel():
    for y in three_paths(torch.zeros(4, 0), torch.ones(4), torch.zeros(4), (-7, 7), 0):
        assert y.shape == (4, 0)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', ALL_BITS)
def test_negative_only_and_constant(bits, symmetric):
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    x = -torch.linspace(1, 2, 50)
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), spec)
    for y in three_paths(x, scale, zero_point, spec.integer_range):
        assert (y - x).abs().max() <= scale / 2 * (1 + 1e-5)
        assert torch.allclose(y.min(), torch.tensor(-2.), rtol=1e-6)
    for value in (-3.3, 4.4):
        constant = torch.full((5, ), value)
        scale, zero_point = scale_and_zero_point(constant.min(), constant.max(), spec)
        for y in three_paths(constant, scale, zero_point, spec.integer_range):
            # An end of the range: no rounding error but that of float32.
            assert torch.allclose(y, constant, rtol=1e-6)


def test_nan_stays_nan():
    x = torch.tensor([1., math.nan, -2.])
    for y in three_paths(x, torch.tensor(1.), torch.tensor(0.), (-7, 7)):
        assert y.isnan().tolist() == [False, True, False]
        assert y[0] == 1 and y[2] == -2
    for y in three_paths(x[:, None], torch.ones(3), torch.zeros(3), (-7, 7), 0):
        assert y.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('size', [1e30, 3e38, 1e-30, 1e-37, 1e-40, 1e-45])
def test_huge_and_tiny_ranges_stay_finite(size, symmetric):
    spec = QuantSpec(bits=8, symmetric=symmetric)
    x = torch.tensor([-1., -0.5, 0., 0.25, 1.]) * size
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), spec)
    assert scale > 0
    assert scale.reciprocal().isfinite()
    for y in three_paths(x, scale, zero_point, spec.integer_range):
        assert y.isfinite().all()
        if size >= 1e-30:
            assert (y.double() - x.double()).abs().max() <= scale.double() * 0.501
        elif size <= 1e-37:  # below what float32 can hold a scale for
            assert (y == 0).all()


@pytest.mark.parametrize('value', [1e30, 3e38, math.inf])
def test_values_far_out_of_a_tiny_range_saturate(value):
    x = torch.tensor([-value, value])
    for y in three_paths(x, torch.tensor(1e-30), torch.tensor(0.), (-7, 7)):
        assert torch.allclose(y, torch.tensor([-7e-30, 7e-30]), rtol=1e-6, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_type_of_the_input_is_kept(dtype):
    x, scale, zero_point, integers = random_case(4, False, (50, ))
    x, scale = (x / scale).to(dtype), torch.tensor(1.3)
    expected = torch_fake_quantize(x.float(), scale, zero_point, integers)
    for y in three_paths(x, scale, zero_point, integers):
        assert y.dtype == dtype
        # Half precision is quantized in float32 and rounded once, at the end.
        assert torch.allclose(y, expected.to(dtype), rtol=0 if dtype != torch.float64 else 1e-6)


def test_half_precision_gradient():
    x = torch.tensor([0.4, 9., -9.], dtype=torch.float16, requires_grad=True)
    y = fake_quantize(x, torch.tensor(1.), torch.tensor(0.), (-7, 7))
    y.backward(torch.tensor([2., 3., 4.], dtype=torch.float16))
    assert x.grad.dtype == torch.float16
    assert x.grad.tolist() == [2., 0., 0.]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_integers_of_half_precision(dtype):
    x, scale, zero_point, integers = random_case(8, False, (2000, ))
    x, scale = (x / scale / 100).to(dtype), torch.tensor(0.0123)
    q = quantize_to_integers(x, scale, zero_point, integers)
    assert torch.equal(q, quantize_to_integers(x.float(), scale, zero_point, integers))
    assert torch.equal(dequantize(q, scale, zero_point).to(dtype),
                       fake_quantize(x, scale, zero_point, integers))


def test_input_is_not_changed():
    x, scale, zero_point, integers = random_case(4, False, (20, ))
    before = x.clone()
    three_paths(x, scale, zero_point, integers)
    quantize_to_integers(x, scale, zero_point, integers)
    assert torch.equal(x, before)


# Gradients

def test_gradient_of_x_by_hand():
    x = torch.tensor([-8., -7.6, -7.4, 0., 6.5, 7., 7.4, 7.5, 7.6], requires_grad=True)
    # Inside is what rounds to -7..7: the tie 7.5 rounds to 8.
    inside = torch.tensor([0., 0., 1., 1., 1., 1., 1., 0., 0.])
    upstream = torch.arange(1., 10.)
    fake_quantize(x, torch.tensor(1.), torch.tensor(0.), (-7, 7)).backward(upstream)
    assert torch.equal(x.grad, inside * upstream)
    x.grad = None
    scale = torch.tensor(1., requires_grad=True)
    fake_quantize(x, scale, torch.tensor(0.), (-7, 7)).backward(upstream)
    assert torch.equal(x.grad, inside * upstream)


@pytest.mark.parametrize('axis', [None, 0, -1])
@pytest.mark.parametrize('bits', ALL_BITS)
def test_gradient_of_x_equals_torch(bits, axis):
    x, scale, zero_point, integers = random_case(bits, False, (6, 9, 4), axis)
    upstream = torch.randn(x.shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    fake_quantize(ours, scale, zero_point, integers, axis).backward(upstream)
    torch_fake_quantize(theirs, scale, zero_point, integers, axis).backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)
    assert 0 < (ours.grad == 0).sum() < x.numel()


def test_lsq_gradients_by_hand():
    x = torch.tensor([1.3, -0.9, 9., -9., 3.5], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    zero_point = torch.tensor(8., requires_grad=True)
    fake_quantize(x, scale, zero_point, (0, 15)).backward(
        torch.tensor([1., 10., 100., 1000., 10000.]))
    # v = x / s is 2.6, -1.8, 18, -18 and 7, which is exactly the upper end.
    # Scale: 3 - 2.6, -2 + 1.8, 15 - 8, 0 - 8, 7 - 7.
    assert scale.grad.item() == pytest.approx(0.4 - 2. + 700. - 8000. + 0., rel=1e-5)
    # Zero point: -s where clipped, else 0.
    assert zero_point.grad.item() == pytest.approx(-0.5 * 1100.)
    assert x.grad.tolist() == [1., 10., 0., 0., 10000.]


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('axis', [None, 0, -1])
@pytest.mark.parametrize('bits', ALL_BITS)
def test_lsq_gradients_by_formula(bits, axis, symmetric):
    x, scale, zero_point, (qmin, qmax) = random_case(bits, symmetric, (6, 9, 4), axis)
    upstream = torch.randn(x.shape)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    fake_quantize(*leaves, (qmin, qmax), axis).backward(upstream)

    view = [1] * 3
    if axis is not None:
        view[axis] = -1
    s = scale.double().reshape(view)
    z = zero_point.double().reshape(view)
    v = x.double() / s
    below, above = v.round() + z < qmin, v.round() + z > qmax
    of_scale = torch.where(below, qmin - z, torch.where(above, qmax - z, v.round() - v))
    of_zero_point = torch.where(below | above, -s, torch.zeros(()).double())
    others = list(range(3)) if axis is None else [d for d in range(3) if d != axis % 3]
    # One term of the sum carries a float32 error of about 1e-5.
    assert torch.allclose(leaves[1].grad.double(), (of_scale * upstream).sum(others), atol=2e-2,
                          rtol=1e-4)
    assert torch.allclose(leaves[2].grad.double(), (of_zero_point * upstream).sum(others),
                          rtol=1e-4, atol=float(s.max()) * 1e-4)
    assert torch.allclose(leaves[0].grad, upstream * ~(below | above), rtol=1e-5)


def test_lsq_gradients_equal_torch():
    x, scale, zero_point, integers = random_case(4, False, (500, ))
    upstream = torch.randn(x.shape)
    ours = [t.clone().requires_grad_() for t in (x, scale.reshape(1), zero_point.reshape(1))]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    fake_quantize(ours[0], ours[1].reshape(()), ours[2].reshape(()), integers).backward(upstream)
    torch._fake_quantize_learnable_per_tensor_affine(*theirs, *integers, 1.).backward(upstream)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4)


@pytest.mark.parametrize('bits', [2, 4])
def test_values_on_the_ends_have_whole_gradients(bits):
    # Of a low-bit tensor a large part rounds to the ends exactly.
    top = 2**(bits - 1) - 1
    x = torch.tensor([-top - 0.2, top + 0.2, float(top)], requires_grad=True)
    scale = torch.tensor(1., requires_grad=True)
    fake_quantize(x, scale, torch.tensor(0.), (-top, top)).backward(torch.tensor([1., 10., 100.]))
    assert x.grad.tolist() == [1., 10., 100.]
    assert scale.grad.item() == pytest.approx(0.2 * 1 - 0.2 * 10 + 0, rel=1e-4)


@pytest.mark.parametrize('size', [1e-30, 1e-25, 1e25, 1e30])
def test_learnable_gradients_are_finite(size):
    # One dead channel, of weights that decayed, must not spoil its neighbours.
    x = (torch.linspace(-1, 1, 10) * size).requires_grad_()
    scale = torch.tensor(size / 6, requires_grad=True)
    upstream = torch.arange(1., 11.)
    fake_quantize(x, scale, torch.tensor(0.), (-7, 7)).backward(upstream)
    v = torch.linspace(-6, 6, 10)
    assert torch.allclose(x.grad, upstream)
    assert torch.allclose(scale.grad, ((v.round() - v) * upstream).sum(), atol=1e-4)


def test_no_gradient_where_none_is_asked_for():
    x = torch.randn(5)
    scale = torch.tensor(1., requires_grad=True)
    with torch.no_grad():
        assert not fake_quantize(x, scale, torch.tensor(0.), (-7, 7)).requires_grad
    frozen = fake_quantize(x, scale.detach(), torch.tensor(0.), (-7, 7))
    assert not frozen.requires_grad
    assert torch.equal(frozen, x.round())

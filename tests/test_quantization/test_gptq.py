# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""GPTQ against hand-computed cases and its definition by inverses of submatrices."""
import math

import pytest
import torch

from psaq_mm.quantization import fake_quantize, gptq, gptq_round, second_moments

W4 = (-7, 7)


def case(rows, inputs, samples=512, seed=0, bits=4):
    """Weights, correlated inputs, and min-max scales."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / math.sqrt(inputs)
    x = torch.randn(samples, inputs, generator=generator) @ mixing
    x = (x + 0.5).relu()  # as activations are: not around 0
    weight = torch.randn(rows, inputs, generator=generator)
    top = 2**(bits - 1) - 1
    scale = weight.abs().amax(1) / top
    return weight, x, scale, (-top, top)


def rounded(weight, x, scale, integers, zero_point=None):
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    return gptq_round(weight, second_moments(x), scale, zero_point, integers)


def nearest(weight, scale, integers):
    return fake_quantize(weight, scale, torch.zeros_like(scale), integers, 0)


def output_error(weight, other, x):
    return float(((weight - other) @ x.T).square().sum())


def by_definition(weight, x, scale, integers):
    """Optimal Brain Surgeon, column by column, with an inverse for each step
    (Hassibi and Stork, 1993; GPTQ, equation 2)."""
    moment = (x.T @ x).double()
    order = moment.diagonal().argsort(descending=True, stable=True).tolist()
    moment = moment + gptq.DAMPING * moment.diagonal().mean() * torch.eye(len(moment))
    current, done = weight.double().clone(), weight.clone()
    for place, i in enumerate(order):
        left = order[place:]
        inverse = moment[left][:, left].inverse()
        done[:, i] = nearest(current[:, i:i + 1].float(), scale, integers)[:, 0]
        lost = (current[:, i] - done[:, i]) / inverse[0, 0]
        current[:, left] -= torch.outer(lost, inverse[0])
    return done


def test_two_inputs_that_are_always_alike_by_hand():
    # 0.4 + 0.4 is to stay about 0.8 where both inputs are 1: not 0 + 0 but 0 + 1.
    weight, x = torch.tensor([[0.4, 0.4], [0.8, 0.9]]), torch.ones(1, 2)
    scale = torch.ones(2)
    assert nearest(weight, scale, W4).tolist() == [[0., 0.], [1., 1.]]
    assert rounded(weight, x, scale, W4).tolist() == [[0., 1.], [1., 1.]]


def test_inputs_that_go_apart_make_up_with_the_other_sign():
    weight, x = torch.tensor([[0.4, 0.4]]), torch.tensor([[1., -1.]])
    # 0.4 - 0.4 = 0: the error of the first, 0.4, is taken from the second: 0.
    assert rounded(weight, x, torch.ones(1), W4).tolist() == [[0., 0.]]
    weight = torch.tensor([[0.4, -0.4]])  # 0.8 = 0 - (-1) within 0.2
    assert rounded(weight, x, torch.ones(1), W4).tolist() == [[0., -1.]]


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('bits', [3, 4, 8])
def test_equals_its_definition(bits, seed):
    weight, x, scale, integers = case(6, 24, seed=seed, bits=bits)
    assert torch.equal(rounded(weight, x, scale, integers),
                       by_definition(weight, x, scale, integers))


def test_more_columns_than_a_block_equal_the_definition(monkeypatch):
    monkeypatch.setattr(gptq, 'BLOCK', 7)
    weight, x, scale, integers = case(5, 40)
    assert torch.equal(rounded(weight, x, scale, integers),
                       by_definition(weight, x, scale, integers))


@pytest.mark.parametrize('bits', [3, 4])
def test_outputs_stay_closer_than_by_rounding_to_nearest(bits):
    for seed in range(5):
        weight, x, scale, integers = case(16, 96, seed=seed, bits=bits)
        plain = output_error(weight, nearest(weight, scale, integers), x)
        assert output_error(weight, rounded(weight, x, scale, integers), x) < 0.7 * plain


def test_inputs_that_have_nothing_in_common_leave_rounding_to_nearest():
    weight, _, scale, integers = case(8, 16)
    x = torch.diag(torch.rand(16) + 0.5)
    assert torch.equal(rounded(weight, x, scale, integers), nearest(weight, scale, integers))


@pytest.mark.parametrize('x', [torch.zeros(3, 16), torch.empty(0, 16)])
def test_inputs_of_zeros_or_none_leave_rounding_to_nearest(x):
    weight, _, scale, integers = case(8, 16)
    assert torch.equal(rounded(weight, x, scale, integers), nearest(weight, scale, integers))


def test_zero_points_and_the_ends_of_the_range():
    weight, x, _, _ = case(8, 24)
    weight = weight * 3 + 1
    scale, zero_point = torch.full((8, ), 0.25), torch.full((8, ), 6.)
    values = rounded(weight, x, scale, (0, 15), zero_point)
    integers = values / 0.25 + 6
    assert torch.equal(integers, integers.round())
    assert integers.min() == 0 and integers.max() == 15  # much is beyond -1.5 and 2.25


def test_what_is_rounded_stays_when_it_is_rounded_to_nearest():
    weight, x, scale, integers = case(8, 64, bits=3)
    values = rounded(weight, x, scale, integers)
    assert torch.equal(nearest(values, scale, integers), values)


def test_a_layer_of_many_inputs_is_cut_into_parts(monkeypatch):
    monkeypatch.setattr(gptq, 'MAX_INPUTS', 10)
    assert gptq.parts_of(24) == [8, 8, 8]
    assert gptq.parts_of(25) == [9, 8, 8]
    assert gptq.parts_of(10) == [10]
    weight, x, scale, integers = case(4, 24)
    parts = [by_definition(w, part, scale, integers)
             for w, part in zip(weight.split(8, 1), x.split(8, 1))]
    assert torch.equal(rounded(weight, x, scale, integers), torch.cat(parts, 1))


def test_fewer_samples_than_inputs():
    weight, x, scale, integers = case(8, 48, samples=5)
    plain = output_error(weight, nearest(weight, scale, integers), x)
    assert output_error(weight, rounded(weight, x, scale, integers), x) < 0.3 * plain


def test_the_factor_is_that_of_the_damped_inverse():
    _, x, _, _ = case(1, 12)
    moment, = second_moments(x)
    factor = gptq.inverse_factor(moment)
    damped = moment.double() + gptq.DAMPING * moment.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(factor.T @ factor, damped.inverse(), rtol=1e-6, atol=1e-9)
    assert torch.equal(factor, factor.triu())


def test_a_moment_that_is_not_positive_is_damped_more():
    moment = torch.tensor([[1., 2.], [2., 1.]])  # no second moment; rounding can make such
    factor = gptq.inverse_factor(moment)
    assert torch.isfinite(factor).all()


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_an_error(bad):
    weight, x, scale, integers = case(2, 4)
    x[3, 1] = bad
    with pytest.raises(ValueError, match='not finite'):
        rounded(weight, x, scale, integers)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_weight_is_kept(dtype):
    weight, x, scale, integers = case(2, 8)
    values = rounded(weight.to(dtype), x.to(dtype), scale, integers)
    assert values.dtype == dtype

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Range rules against brute force."""
import math
import pickle

import pytest
import torch

from psaq_mm.errors import UserError
from psaq_mm.quantization import (
    MAEObserver,
    MinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    QuantSpec,
    fake_quantize,
    scale_and_zero_point,
)
from psaq_mm.registry import OBSERVERS

RULES = [MinMaxObserver, MSEObserver, MAEObserver, PercentileObserver]


def batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, 8, generator=generator) * (i + 1) + i for i in range(count)]


def observed(observer, values, axis=None):
    for value in values:
        observer.observe(value, axis)
    return observer.range()


def rounding_error(values, lower, upper, bits, symmetric, power=2):
    """Of rounding a list of floats to a range, number by number."""
    lower, upper = min(lower, 0.), max(upper, 0.)
    if symmetric:
        top = 2**(bits - 1) - 1
        step, qmin, qmax, zero = max(-lower, upper) / top, -top, top, 0
    else:
        qmin, qmax = 0, 2**bits - 1
        step = (upper - lower) / qmax
        zero = round(-lower / step)
    error = 0.
    for value in values:
        q = min(max(round(value / step) + zero, qmin), qmax)
        error += abs(value - (q - zero) * step)**power
    return error / len(values)


# Minimum and maximum

def test_min_max_by_hand():
    observer = MinMaxObserver(QuantSpec())
    observer.observe(torch.tensor([[1., 2.], [3., -1.]]))
    assert [end.tolist() for end in observer.range()] == [[-1.], [3.]]
    observer.observe(torch.tensor([0., 2.5]))
    assert [end.tolist() for end in observer.range()] == [[-1.], [3.]]
    observer.observe(torch.tensor(7.))
    observer.observe(torch.tensor([-2., 0.]))
    assert [end.tolist() for end in observer.range()] == [[-2.], [7.]]
    assert observer.seen == 9


@pytest.mark.parametrize('axis', [0, 1, -1, -2])
def test_min_max_per_channel(axis):
    values = batches()
    lower, upper = observed(MinMaxObserver(QuantSpec()), values, axis)
    for channel in range(values[0].shape[axis]):
        slices = torch.cat([v.select(axis, channel).flatten() for v in values])
        assert lower[channel] == slices.min()
        assert upper[channel] == slices.max()
    assert len(lower) == len(upper) == values[0].shape[axis]


def test_min_max_equals_that_of_all_batches_at_once():
    values = batches()
    lower, upper = observed(MinMaxObserver(QuantSpec()), values)
    assert lower.tolist() == [torch.cat(values).min().item()]
    assert upper.tolist() == [torch.cat(values).max().item()]


def test_values_are_not_kept_by_reference():
    for rule in RULES:
        observer, x = rule(QuantSpec()), torch.linspace(-1, 1, 100)
        observer.observe(x)
        before = [end.clone() for end in observer.range()]
        x.mul_(100)
        assert all(torch.equal(a, b) for a, b in zip(observer.range(), before))


# Percentile

def test_percentile_by_hand():
    x = torch.arange(1001.)[torch.randperm(1001)]
    # 1 % of 1000 gaps, half at each end.
    observer = PercentileObserver(QuantSpec(), percentile=0.99)
    assert [end.tolist() for end in observed(observer, [x])] == [[5.], [995.]]
    assert [end.tolist() for end in observed(PercentileObserver(QuantSpec(), percentile=1.),
                                             [x])] == [[0.], [1000.]]


@pytest.mark.parametrize('percentile', [0.6, 0.9, 0.987, 0.9999])
@pytest.mark.parametrize('axis', [None, 1])
def test_percentile_equals_brute_force(percentile, axis):
    values = batches(6)
    lower, upper = observed(PercentileObserver(QuantSpec(), percentile=percentile), values, axis)
    joined = torch.cat(values)
    rows = [joined.flatten()] if axis is None else [r.flatten() for r in joined.unbind(axis)]
    assert len(lower) == len(rows)
    for index, row in enumerate(rows):
        ordered = sorted(row.tolist())
        clipped = math.floor((1 - percentile) / 2 * (len(ordered) - 1) + 0.5)
        assert lower[index].item() == ordered[clipped]
        assert upper[index].item() == ordered[-1 - clipped]
        tail = (1 - percentile) / 2
        for end, quantile in ((lower, tail), (upper, 1 - tail)):
            assert end[index].item() == pytest.approx(
                torch.quantile(row, quantile, interpolation='nearest').item(), abs=0.2)


def test_percentile_drops_outliers():
    x = torch.cat([torch.randn(100000), torch.tensor([1e6, -1e6])])
    lower, upper = observed(PercentileObserver(QuantSpec(), percentile=0.999), [x])
    # 3.29 is the normal quantile of 0.9995.
    assert lower.item() == pytest.approx(-3.29, abs=0.3)
    assert upper.item() == pytest.approx(3.29, abs=0.3)


def test_percentile_keeps_no_more_than_asked():
    observer = PercentileObserver(QuantSpec(), samples=100)
    for size in (99, 100, 101, 1000, 12345):
        observer.kept.clear()
        observer.observe(torch.randn(size))
        assert 1 < sum(kept.numel() for kept in observer.kept) <= 100


# Mean squared and absolute error

@pytest.mark.parametrize('rule, power', [(MSEObserver, 2), (MAEObserver, 1)])
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_error_equals_brute_force(bits, symmetric, rule, power):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(400, generator=generator)**3 + 0.5  # long tails
    spec = QuantSpec(bits, symmetric)
    lower, upper = observed(rule(spec, candidates=9, min_factor=0.2), [x[:150], x[150:]])
    values = x.tolist()
    factors = [1 - 0.1 * i for i in range(9)]
    errors = [rounding_error(values, min(values) * f, max(values) * f, bits, symmetric, power)
              for f in factors]
    best = factors[errors.index(min(errors))]
    assert lower.item() == pytest.approx(min(values) * best, rel=1e-5)
    assert upper.item() == pytest.approx(max(values) * best, rel=1e-5)
    if bits <= 4:
        assert best < 1


@pytest.mark.parametrize('axis', [None, 0, -1])
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
def test_mse_is_never_above_min_max(bits, symmetric, axis):
    spec = QuantSpec(bits, symmetric)
    for seed, power in ((0, 1), (1, 3), (2, None)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(3, 40, 5, generator=generator) * 10.**seed
        x = x.pow(power) if power else torch.where(x > 0, 200., -100.)  # nothing to clip
        ranges = [observed(rule(spec), [x], axis) for rule in (MSEObserver, MinMaxObserver)]
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
        for channel, row in enumerate(rows.tolist()):
            ours, theirs = (rounding_error(row, lower[channel].item(), upper[channel].item(), bits,
                                           symmetric) for lower, upper in ranges)
            assert ours <= theirs * (1 + 1e-5) + 1e-12 * max(map(abs, row))**2


def test_mse_clips_an_outlier_at_4_bits():
    x = torch.cat([torch.randn(5000), torch.tensor([12.])])
    lower, upper = observed(MSEObserver(QuantSpec(4, True)), [x])
    assert 2 < upper.item() < 8
    _, whole = observed(MSEObserver(QuantSpec(8, True)), [torch.linspace(-1, 1, 1000)])
    assert whole.item() == pytest.approx(1, abs=0.02)  # nothing to win by clipping


def test_absolute_error_leaves_even_attention():
    """Of 50 windows of 49 tokens most attend evenly and some to one token: what
    either rule leaves of both, in 3 bits."""
    even = torch.full((40 * 49, 49), 1 / 49)
    sharp = torch.zeros(10 * 49, 49)
    sharp[:, 7] = 0.6
    spec = QuantSpec(3, False)
    left = {}
    for rule in (MSEObserver, MAEObserver):
        ends = observed(rule(spec, candidates=100, min_factor=0.02, samples=10**6),
                        [torch.cat([even, sharp])])
        scale, zero_point = scale_and_zero_point(*ends, spec)
        left[rule] = [fake_quantize(rows, scale, zero_point, spec.integer_range).sum(1).mean()
                      for rows in (even, sharp)]
    assert left[MSEObserver][0] == 0  # 1 / 49 is less than half a step of 0.6 / 7
    assert left[MAEObserver][0] == pytest.approx(1, abs=0.1)
    assert left[MSEObserver][1] > left[MAEObserver][1] > 0  # at a price


@pytest.mark.parametrize('value', [0., 1e-30, 1e30, -5.])
def test_mse_of_constants(value):
    lower, upper = observed(MSEObserver(QuantSpec(4, False)), [torch.full((10, ), value)])
    assert lower.item() == upper.item() == pytest.approx(value)


# All rules

@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(rule, bad):
    observer = rule(QuantSpec())
    observer.observe(torch.tensor([1., 2.]))
    for axis in (None, 0):
        with pytest.raises(ValueError, match='NaN or infinite'):
            observer.observe(torch.tensor([[0.], [bad]]), axis)
    with pytest.raises(ValueError, match='NaN or infinite'):
        observer.observe(torch.tensor([math.inf, -math.inf, 3.]))
    # What was refused left no trace.
    assert observer.seen == 2
    assert observer.range()[1].item() <= 2


@pytest.mark.parametrize('rule', RULES)
def test_huge_values_are_no_infinite_values(rule):
    observer = rule(QuantSpec())
    observer.observe(torch.full((100, ), 3e38))  # their sum overflows
    assert observer.range()[1].item() == pytest.approx(3e38)


@pytest.mark.parametrize('rule', RULES)
def test_empty_batch_is_ignored(rule):
    observer = rule(QuantSpec())
    observer.observe(torch.zeros(0, 4))
    assert observer.seen == 0
    with pytest.raises(ValueError, match='no values were observed'):
        observer.range()
    observer.observe(torch.tensor([-1., 1.]))
    observer.observe(torch.zeros(2, 0), axis=0)
    assert observer.seen == 2
    assert [end.item() for end in observer.range()] == [-1., 1.]


@pytest.mark.parametrize('rule', RULES)
def test_nothing_observed(rule):
    with pytest.raises(ValueError, match='no values were observed'):
        rule(QuantSpec()).range()


@pytest.mark.parametrize('rule', RULES)
def test_half_precision_and_gradients(rule):
    observer = rule(QuantSpec())
    observer.observe(torch.tensor([-1.5, 2.5], dtype=torch.float16))
    observer.observe(torch.tensor([0.25], requires_grad=True))
    lower, upper = observer.range()
    assert lower.dtype == upper.dtype == torch.float32
    assert not lower.requires_grad
    assert not upper.requires_grad
    assert (lower.item(), upper.item()) == (-1.5, 2.5)


@pytest.mark.parametrize('rule', [PercentileObserver, MSEObserver])
def test_subsample_sees_all_channels(rule):
    # A stride that divides by the number of channels would see one of them.
    x = torch.randn(1024, 16)
    x[:, 0] *= 0.01
    every = observed(rule(QuantSpec(), samples=x.numel()), [x])
    some = observed(rule(QuantSpec(), samples=1024), [x])
    for a, b in zip(every, some):
        assert b.item() == pytest.approx(a.item(), rel=0.5)


@pytest.mark.parametrize('rule, arguments', [
    (PercentileObserver, dict(percentile=0.5)), (PercentileObserver, dict(percentile=1.1)),
    (PercentileObserver, dict(samples=1)), (MSEObserver, dict(candidates=1)),
    (MSEObserver, dict(min_factor=0.)), (MSEObserver, dict(min_factor=1.)),
    (MSEObserver, dict(samples=0))
])
def test_arguments_out_of_range(rule, arguments):
    name, = arguments
    with pytest.raises(UserError, match=f'observer.{name} must be'):
        rule(QuantSpec(), **arguments)


def test_rules_are_registered():
    assert [OBSERVERS.get(rule.__name__) for rule in RULES] == RULES


def test_base_class_leaves_the_rule_to_subclasses():
    observer = Observer(QuantSpec())
    with pytest.raises(NotImplementedError):
        observer.observe(torch.ones(1))
    with pytest.raises(NotImplementedError):
        observer.range()


@pytest.mark.parametrize('rule', RULES)
def test_what_two_processes_saw(rule):
    """A snapshot can be pickled by any torch, and merged it gives the range of all."""
    one, other, both = (rule(QuantSpec()) for _ in range(3))
    first, second = batches(2)
    one.observe(first)
    other.observe(second)
    snapshot = other.snapshot('cpu')
    assert not any(isinstance(value, torch.Generator) for value in vars(snapshot).values())
    one.merge([pickle.loads(pickle.dumps(snapshot))])
    for low_high, expected in zip(one.range(), observed(both, [first, second])):
        assert torch.equal(low_high, expected)
    other.observe(first)  # goes on, and the snapshot does not
    assert snapshot.seen == second.numel()

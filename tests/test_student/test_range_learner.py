# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Ranges learned in relative steps, against autograd of the same thing said plainly."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.quantization import Quantizer, QuantSpec
from psaq_mm.student.range_learner import RangeLearner


def quantizer(scale, zero_point=0., bits=8, symmetric=False):
    made = Quantizer(QuantSpec(bits, symmetric, 'per_channel'), 0)
    scale = torch.as_tensor(scale, dtype=torch.float32)
    if not scale.dim():
        made = Quantizer(QuantSpec(bits, symmetric))
    made._store('scale', scale.clone())
    made._store('zero_point', torch.full_like(scale, zero_point))
    return made


@pytest.fixture
def quantizers():
    """8 and 4 bits, one or several ranges, symmetric or not."""
    return [quantizer(0.5, 100.), quantizer([1e-3, 0.2, 7.], symmetric=True),
            quantizer([0.03, 40.], 7., bits=4)]


def test_what_is_learned(quantizers):
    """Scales and zero points; a symmetric range has no zero point to learn."""
    learner = RangeLearner(quantizers)
    assert [tuple(t.shape) for t in learner.tensors] == [(), (), (3, ), (2, ), (2, )]
    assert learner.offsets.shape == (9, )
    assert not learner.offsets.detach().any() and learner.offsets.requires_grad
    learner.require_grad(True)
    assert [q.scale.requires_grad for q in quantizers] == [True] * 3
    assert [q.zero_point.requires_grad for q in quantizers] == [True, False, True]
    learner.require_grad(False)
    assert not any(t.requires_grad for q in quantizers for t in (q.scale, q.zero_point))


def test_gradients_against_an_explicit_parameterisation(quantizers):
    """d/d offset of a loss of scale = exp(log s0 + offset) and zero point =
    z0 + offset * number of integers."""
    learner = RangeLearner(quantizers)
    starts = [(q.scale.clone(), q.zero_point.clone()) for q in quantizers]

    def loss(ranges):
        return sum((scale.square() * (i + 1) + zero_point * scale.sin()).sum()
                   for i, (scale, zero_point) in enumerate(ranges))

    offsets = [torch.zeros_like(t, requires_grad=True) for pair in starts for t in pair]
    explicit = [(torch.exp(torch.log(scale) + offsets[2 * i]),
                 zero_point + offsets[2 * i + 1] * (255, 0, 15)[i])
                for i, (scale, zero_point) in enumerate(starts)]
    loss(explicit).backward()
    expected = torch.cat([offset.grad.flatten() for i, offset in enumerate(offsets) if i != 3])

    learner.require_grad(True)
    loss([(q.scale, q.zero_point) for q in quantizers]).backward()
    learner.collect_gradients()
    torch.testing.assert_close(learner.offsets.grad, expected, rtol=1e-5, atol=1e-6)
    assert all(tensor.grad is None for tensor in learner.tensors)


def test_gradients_of_quantization(quantizers):
    """Those that the straight-through estimator gives, times scale or integers."""
    learner = RangeLearner(quantizers[:1])
    learner.require_grad(True)
    # Of [-50, 77.5], one value lies below, one above, one within by 0.2 steps.
    quantizers[0](torch.tensor([-60., 90., 3.1])).sum().backward()
    learner.collect_gradients()
    by_scale = (0 - 100) + (255 - 100) + (6 - 6.2)
    by_zero_point = 2 * -0.5
    assert learner.offsets.grad.tolist() == pytest.approx(
        [by_scale * 0.5, by_zero_point * 255], rel=1e-5)


def test_ranges_without_a_gradient(quantizers):
    """A quantizer that the forward pass did not reach stays."""
    learner = RangeLearner(quantizers)
    learner.require_grad(True)
    (quantizers[0].scale * 3).backward()
    learner.collect_gradients()
    assert learner.offsets.grad.tolist() == pytest.approx([1.5] + [0.] * 8)


@given(exponents=st.lists(st.floats(-6, 4), min_size=1, max_size=6), lr=st.floats(1e-4, 0.3))
@settings(deadline=None, max_examples=40)
def test_steps_are_relative(exponents, lr):
    """Scales of any magnitude move by the same factor."""
    scales = torch.tensor([10.**e for e in exponents])
    single = [quantizer(float(scale), symmetric=True) for scale in scales]
    learner = RangeLearner(single)
    optimizer = torch.optim.Adam([learner.offsets], lr=lr)
    learner.require_grad(True)
    sum(q.scale for q in single).backward()
    learner.collect_gradients()
    optimizer.step()
    learner.apply()
    ratios = torch.stack([q.scale.detach() for q in single]) / scales
    # Adam's first step is lr, whatever the gradient, down to its eps of 1e-8.
    expected = torch.exp(-lr * scales / (scales + 1e-8))
    torch.testing.assert_close(ratios, expected, rtol=1e-5, atol=0.)


def test_steps_of_zero_points_are_fractions_of_the_integers():
    eight, four = quantizer(0.1, 100.), quantizer(0.1, 7., bits=4)
    learner = RangeLearner([eight, four])
    with torch.no_grad():
        learner.offsets += torch.tensor([0., 0.1, 0., -0.2])
    learner.apply()
    assert [float(eight.zero_point), float(four.zero_point)] == pytest.approx([125.5, 4.])
    assert [float(eight.scale), float(four.scale)] == pytest.approx([0.1, 0.1], rel=1e-6)


@pytest.mark.parametrize('bits, offset, expected', [
    (8, 5., 255.), (8, -5., 0.), (4, 5., 15.), (4, -5., 0.), (4, 0.1, 8.5)])
def test_zero_point_stays_one_of_the_integers(bits, offset, expected):
    made = quantizer(0.1, 7., bits=bits)
    learner = RangeLearner([made])
    with torch.no_grad():
        learner.offsets[1] = offset
    learner.apply()
    assert float(made.zero_point) == pytest.approx(expected)
    with torch.no_grad():
        assert float(made(torch.zeros(()))) == 0.  # so 0 stays representable


def test_making_a_learner_changes_no_range(quantizers):
    before = [(q.scale.clone(), q.zero_point.clone()) for q in quantizers]
    learner = RangeLearner(quantizers)
    for _ in range(2):
        for made, (scale, zero_point) in zip(quantizers, before):
            torch.testing.assert_close(made.scale, scale, rtol=1e-6, atol=0.)
            assert torch.equal(made.zero_point, zero_point)
        learner.apply()


def test_whether_a_range_has_moved(quantizers):
    learner = RangeLearner(quantizers)
    learner.apply()
    assert learner.moved is False
    start = learner.state_dict()
    with torch.no_grad():
        learner.offsets[4] = -1e-3
    assert learner.moved is True
    learner.load_state_dict(start)
    assert learner.moved is False


def test_nothing_to_learn():
    learner = RangeLearner([])
    assert learner.moved is False
    learner.require_grad(True)
    learner.collect_gradients()
    learner.apply()
    assert learner.offsets.shape == learner.offsets.grad.shape == (0, )


@pytest.mark.parametrize('steps', [0, 1, 3])
def test_restored_learner_gives_the_same_bits(steps, quantizers):
    """At the point of the state, and after more steps."""
    other_quantizers = copy.deepcopy(quantizers)

    def step(learner, made, index):
        learner.require_grad(True)
        sum((q.scale.cos() * (index + 1)).sum() + (q.zero_point**2).sum()
            for q in made).backward()
        learner.collect_gradients()
        with torch.no_grad():
            learner.offsets -= 1e-3 * learner.offsets.grad.sign()
        learner.apply()
        learner.require_grad(False)

    def ranges(made):
        return [t.detach().clone() for q in made for t in (q.scale, q.zero_point)]

    first = RangeLearner(quantizers)
    for index in range(steps):
        step(first, quantizers, index)
    state = first.state_dict()
    kept = copy.deepcopy(state)
    second = RangeLearner(other_quantizers)
    second.load_state_dict(state)
    for index in range(steps, steps + 3):
        assert all(map(torch.equal, ranges(quantizers), ranges(other_quantizers)))
        step(first, quantizers, index)
        step(second, other_quantizers, index)
    assert not torch.equal(first.state_dict()['offsets'], kept['offsets'])
    assert all(torch.equal(state[key], kept[key]) for key in kept)  # it is a copy
    second.load_state_dict(kept)  # and goes back
    third = RangeLearner(quantizers)
    third.load_state_dict(kept)
    assert all(map(torch.equal, ranges(quantizers), ranges(other_quantizers)))

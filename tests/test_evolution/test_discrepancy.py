# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Distances of taps, by hand and against torch."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, kl_divergence

from psaq_mm.evolution import discrepancy
from psaq_mm.evolution.discrepancy import binary_kl, group_of, relative_l1

LOSSES = [relative_l1, binary_kl]


def logit(probability):
    return math.log(probability / (1 - probability))


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


# Each loss by hand, and against torch


def test_relative_l1_by_hand():
    teacher = torch.tensor([[[1., -3.], [0., 4.]], [[2., 2.], [2., 2.]]])
    student = torch.tensor([[[2., -3.], [1., 2.]], [[2., 2.], [2., 0.]]])
    # |T - S| sums to 1 + 0 + 1 + 2 = 4 of 8, and to 2 of 8.
    assert relative_l1(teacher, student).tolist() == pytest.approx([0.5, 0.25], rel=1e-5)


def test_binary_kl_by_hand():
    teacher, student = torch.tensor([[[[logit(0.8)]]]]), torch.tensor([[[[logit(0.5)]]]])
    expected = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert float(binary_kl(teacher, student)) == pytest.approx(expected, rel=1e-5)


def test_binary_kl_against_torch():
    teacher, student = pair(3, 6, 4, 5)
    expected = kl_divergence(Bernoulli(logits=3 * teacher), Bernoulli(logits=3 * student))
    torch.testing.assert_close(binary_kl(3 * teacher, 3 * student), expected.flatten(1).mean(1),
                               rtol=1e-4, atol=1e-6)


def test_extreme_logits_stay_finite():
    teacher = torch.tensor([[[100.], [-100.]]])
    student = (-teacher).requires_grad_(True)
    value = binary_kl(teacher, student)
    value.sum().backward()
    # The student is sure of the opposite: 100 nats a score.
    assert float(value.detach()) == pytest.approx(100., rel=1e-4)
    assert torch.isfinite(student.grad).all() and student.grad.any()


# What both have in common


@pytest.mark.parametrize('loss', LOSSES)
def test_equal_taps_have_no_distance(loss):
    teacher, other = pair(4, 6, 3, 3)
    assert loss(teacher, teacher.clone()).abs().max() <= 1e-7
    assert (loss(teacher, other) > 0.05).all()


@pytest.mark.parametrize('loss', LOSSES)
def test_images_are_independent(loss):
    """Of a batch each image has the value that it has alone."""
    teacher, student = pair(5, 6, 3, 4)
    together = loss(teacher, student)
    assert together.shape == (5, )
    alone = torch.cat([loss(t, s) for t, s in zip(teacher.split(1), student.split(1))])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)
    student = student.clone()
    student[3] += 1 + student[3].abs()
    changed = (loss(teacher, student) - together).abs() > 1e-6
    assert changed.tolist() == [False, False, False, True, False]


@given(exponent=st.integers(-8, 8), seed=st.integers(0, 20))
@settings(deadline=None, max_examples=30)
def test_scale_of_a_tap_does_not_matter(exponent, seed):
    teacher, student = pair(2, 3, 8, seed=seed)
    factor = 2.**exponent
    torch.testing.assert_close(relative_l1(factor * teacher, factor * student),
                               relative_l1(teacher, student), rtol=1e-2, atol=0.)


def test_a_tap_of_zeros_gives_finite_values():
    student = torch.full((1, 4), 1e-3, requires_grad=True)
    value = relative_l1(torch.zeros(1, 4), student)
    value.backward()
    assert torch.isfinite(value) and value > 0
    assert torch.isfinite(student.grad).all()


# Weighted sums over taps


@pytest.fixture
def taps():
    names = ('backbone.0', 'backbone.1', 'neck.0', 'scores.0', 'deltas.0', 'logits.0')
    shapes = ((2, 3, 8, 8), (2, 6, 4, 4), (2, 5, 8, 8), (2, 6, 2, 2), (2, 8, 2, 2), (2, 5, 3, 3))
    pairs = {name: pair(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, shapes))}
    return tuple({name: p[i] for name, p in pairs.items()} for i in (0, 1))


def test_weights_by_group(taps):
    """Scores by the divergence of their probabilities, the rest relative to its size."""
    teacher, student = taps
    weights = dict(backbone=2., neck=0., scores=0.5, deltas=3., logits=0.25)
    expected = 2. * (relative_l1(teacher['backbone.0'], student['backbone.0'])
                     + relative_l1(teacher['backbone.1'], student['backbone.1'])) \
        + 0.5 * binary_kl(teacher['scores.0'], student['scores.0']) \
        + 3. * relative_l1(teacher['deltas.0'], student['deltas.0']) \
        + 0.25 * relative_l1(teacher['logits.0'], student['logits.0'])
    value = discrepancy(teacher, student, weights)
    assert value.shape == (2, )
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize('group, loss', [
    ('backbone', relative_l1), ('neck', relative_l1), ('scores', binary_kl),
    ('deltas', relative_l1), ('logits', relative_l1), ('rois', relative_l1)])
def test_loss_of_each_group(group, loss):
    teacher, student = pair(2, 6, 3, 3)
    value = discrepancy({f'{group}.0': teacher}, {f'{group}.0': student}, {group: 1.})
    assert torch.equal(value, loss(teacher, student))


@pytest.mark.parametrize('weights', [{}, dict(rois=1.), dict(backbone=0., neck=0)])
def test_no_tap_has_a_weight(weights, taps):
    with pytest.raises(ValueError, match=r'no tap of backbone\.0, .*logits\.0 has a weight'):
        discrepancy(*taps, weights)
    with pytest.raises(ValueError, match='no tap of the model has a weight'):
        discrepancy({}, {}, weights)


def test_names():
    assert [group_of(name) for name in ('backbone.3', 'rois.12', 'logits')] == [
        'backbone', 'rois', 'logits']

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Distances of taps, by hand and against torch."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical, kl_divergence

from psaq_mm.evolution import discrepancy
from psaq_mm.evolution.discrepancy import (
    CONFIDENT,
    LOSSES,
    LOSSES_OF_GROUP,
    binary_kl,
    confident_smooth_l1,
    group_of,
    relative_l1,
    relative_l2,
    softmax_kl,
)

PLAIN = [relative_l1, relative_l2, binary_kl, softmax_kl]


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


def test_relative_l2_by_hand():
    teacher = torch.tensor([[[1., -3.], [0., 4.]], [[2., 2.], [2., 2.]]])
    student = torch.tensor([[[2., -3.], [1., 2.]], [[2., 2.], [2., 0.]]])
    # 1 + 1 + 4 = 6 of 26, and 4 of 16.
    assert relative_l2(teacher, student).tolist() == pytest.approx([6 / 26, 0.25], rel=1e-5)


def test_relative_l2_is_an_inverse_signal_to_noise_ratio():
    teacher, student = pair(1, 3, 8, 8)
    noise = 10 * math.log10(float(teacher.var(unbiased=False) + teacher.mean()**2)
                            / float((teacher - student).square().mean()))
    assert -10 * math.log10(float(relative_l2(teacher, student))) == pytest.approx(noise, rel=1e-4)


def test_binary_kl_by_hand():
    teacher, student = torch.tensor([[[[logit(0.8)]]]]), torch.tensor([[[[logit(0.5)]]]])
    expected = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert float(binary_kl(teacher, student)) == pytest.approx(expected, rel=1e-5)


def test_binary_kl_against_torch():
    teacher, student = pair(3, 6, 4, 5)
    expected = kl_divergence(Bernoulli(logits=3 * teacher), Bernoulli(logits=3 * student))
    torch.testing.assert_close(binary_kl(3 * teacher, 3 * student), expected.flatten(1).mean(1),
                               rtol=1e-4, atol=1e-6)


def test_softmax_kl_by_hand():
    teacher = torch.tensor([0.5, 0.3, 0.2]).log().view(1, 3, 1)
    student = torch.tensor([0.2, 0.3, 0.5]).log().view(1, 3, 1)
    expected = 0.5 * math.log(2.5) - 0.2 * math.log(2.5)
    assert float(softmax_kl(teacher, student)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('shape', [(3, 7), (2, 5, 4, 6)])
def test_softmax_kl_against_torch(shape):
    """Of logits, which any offset leaves the same."""
    teacher, student = pair(*shape)
    positions = math.prod(shape[2:])
    expected = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction='none',
                        log_target=True).flatten(1).sum(1) / positions
    torch.testing.assert_close(softmax_kl(teacher, student + 3.), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        expected, kl_divergence(Categorical(logits=teacher.movedim(1, -1)),
                                Categorical(logits=student.movedim(1, -1))
                                ).reshape(shape[0], -1).mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('loss', [binary_kl, softmax_kl])
def test_extreme_logits_stay_finite(loss):
    teacher = torch.tensor([[[100.], [-100.]]])
    student = (-teacher).requires_grad_(True)
    value = loss(teacher, student)
    value.sum().backward()
    # The student is sure of the opposite: 100 nats a score, 200 a position.
    assert float(value.detach()) == pytest.approx(100. if loss is binary_kl else 200., rel=1e-4)
    assert torch.isfinite(student.grad).all() and student.grad.any()


# Confident deltas


def deltas(*shape, anchors=2, classes=3, seed=0):
    batch, height, width = shape
    teacher, student = pair(batch, anchors * 4, height, width, seed=seed)
    scores = torch.full((batch, anchors * classes, height, width), logit(0.1))
    return teacher, 4 * student, scores


def test_confident_smooth_l1_by_hand():
    """One anchor of one position counts, with differences 0.5, 3, 0 and -1."""
    teacher, student, scores = deltas(1, 2, 2)
    scores[0, 3 + 1, 1, 0] = logit(0.9)  # class 1 of anchor 1
    difference = torch.tensor([0.5, 3., 0., -1.])
    student[0, 4:8, 1, 0] = teacher[0, 4:8, 1, 0] + difference
    expected = (0.5 * 0.25 + (3 - 0.5) + 0 + (1 - 0.5)) / 4
    value = confident_smooth_l1(teacher, student, scores)
    assert value.tolist() == pytest.approx([expected], rel=1e-5)


def test_confident_smooth_l1_masks():
    """Only what the teacher is confident of has a value or a gradient."""
    teacher, student, scores = deltas(3, 4, 5)
    chosen = [(0, 0, 1, 2), (0, 1, 3, 4), (2, 1, 0, 0)]  # image, anchor, row, column
    for image, anchor, row, column in chosen:
        scores[image, 3 * anchor + 2, row, column] = logit(0.75)
    student.requires_grad_(True)
    value = confident_smooth_l1(teacher, student, scores)
    parts = [F.smooth_l1_loss(student[i, 4 * a:4 * a + 4, r, c], teacher[i, 4 * a:4 * a + 4, r, c])
             for i, a, r, c in chosen]
    expected = torch.stack([(parts[0] + parts[1]) / 2, torch.zeros(()), parts[2]])
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    touched = {tuple(index) for index in student.grad.nonzero().tolist()}
    assert touched == {(i, 4 * a + d, r, c) for i, a, r, c in chosen for d in range(4)}


@pytest.mark.parametrize('score, counts', [(CONFIDENT - 1e-3, False), (CONFIDENT + 1e-3, True)])
def test_confident_smooth_l1_threshold(score, counts):
    teacher, student, scores = deltas(1, 1, 1, anchors=1, classes=1)
    scores.fill_(logit(score))
    value = float(confident_smooth_l1(teacher, student, scores))
    assert value == (pytest.approx(float(F.smooth_l1_loss(student, teacher))) if counts else 0.)


# What all have in common


@pytest.mark.parametrize('loss', PLAIN)
def test_equal_taps_have_no_distance(loss):
    teacher, other = pair(4, 6, 3, 3)
    assert loss(teacher, teacher.clone()).abs().max() <= 1e-7
    assert (loss(teacher, other) > 0.05).all()


def test_equal_deltas_have_no_distance():
    teacher, student, scores = deltas(2, 3, 3)
    scores[:] = logit(0.9)
    assert not confident_smooth_l1(teacher, teacher.clone(), scores).any()
    assert (confident_smooth_l1(teacher, student, scores) > 0.1).all()


@pytest.mark.parametrize('loss', PLAIN)
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


@given(exponent=st.integers(-8, 8), seed=st.integers(0, 20), loss=st.sampled_from(PLAIN[:2]))
@settings(deadline=None, max_examples=30)
def test_scale_of_a_tap_does_not_matter(exponent, seed, loss):
    teacher, student = pair(2, 3, 8, seed=seed)
    factor = 2.**exponent
    torch.testing.assert_close(loss(factor * teacher, factor * student), loss(teacher, student),
                               rtol=2e-1 if factor < 2**-6 else 1e-2, atol=0.)


@pytest.mark.parametrize('loss', PLAIN[:2])
def test_a_tap_of_zeros_gives_finite_values(loss):
    student = torch.full((1, 4), 1e-3, requires_grad=True)
    value = loss(torch.zeros(1, 4), student)
    value.backward()
    assert torch.isfinite(value) and value > 0
    assert torch.isfinite(student.grad).all()


# Weighted sums over taps


@pytest.fixture
def taps():
    names = ('backbone.0', 'backbone.1', 'neck.0', 'scores.0', 'deltas.0', 'logits.0')
    shapes = ((2, 3, 8, 8), (2, 6, 4, 4), (2, 5, 8, 8), (2, 6, 2, 2), (2, 8, 2, 2), (2, 5, 3, 3))
    pairs = {name: pair(*shape, seed=i) for i, (name, shape) in enumerate(zip(names, shapes))}
    teacher, student = ({name: p[i] for name, p in pairs.items()} for i in (0, 1))
    teacher['scores.0'] = 3 * teacher['scores.0']  # of some the teacher is confident
    return teacher, student


def test_weights_and_losses_by_group(taps):
    teacher, student = taps
    weights = dict(backbone=2., neck=0., scores=0.5, deltas=3., logits=0.25)
    losses = dict(backbone='relative_l2', scores='binary_kl', deltas='confident_smooth_l1',
                  logits='softmax_kl')
    expected = 2. * (relative_l2(teacher['backbone.0'], student['backbone.0'])
                     + relative_l2(teacher['backbone.1'], student['backbone.1'])) \
        + 0.5 * binary_kl(teacher['scores.0'], student['scores.0']) \
        + 3. * confident_smooth_l1(teacher['deltas.0'], student['deltas.0'],
                                   teacher['scores.0']) \
        + 0.25 * softmax_kl(teacher['logits.0'], student['logits.0'])
    value = discrepancy(teacher, student, weights, losses)
    assert value.shape == (2, )
    torch.testing.assert_close(value, expected)


def test_relative_l1_is_the_default(taps):
    teacher, student = taps
    expected = relative_l1(teacher['backbone.0'], student['backbone.0']) \
        + relative_l1(teacher['backbone.1'], student['backbone.1'])
    torch.testing.assert_close(discrepancy(teacher, student, dict(backbone=1.), {}), expected)


def test_deltas_look_at_the_scores_of_their_own_level():
    teacher, student, low = deltas(1, 3, 3)
    other, high = 2 * teacher, torch.full_like(low, logit(0.9))
    taps = {'deltas.0': teacher, 'deltas.1': other, 'scores.0': low, 'scores.1': high}
    others = {'deltas.0': student, 'deltas.1': student, 'scores.0': low, 'scores.1': high}
    value = discrepancy(taps, others, dict(deltas=1.), dict(deltas='confident_smooth_l1'))
    torch.testing.assert_close(value, confident_smooth_l1(other, student, high))


@pytest.mark.parametrize('weights', [{}, dict(rois=1.), dict(backbone=0., neck=0)])
def test_no_tap_has_a_weight(weights, taps):
    with pytest.raises(ValueError, match=r'no tap of backbone\.0, .*logits\.0 has a weight'):
        discrepancy(*taps, weights, {})
    with pytest.raises(ValueError, match='no tap of the model has a weight'):
        discrepancy({}, {}, weights, {})


def test_names():
    assert [group_of(name) for name in ('backbone.3', 'rois.12', 'logits')] == [
        'backbone', 'rois', 'logits']
    for names in LOSSES_OF_GROUP.values():
        assert set(names) <= set(LOSSES)

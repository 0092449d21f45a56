# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The bound of the adversarial gradient."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.evolution.adversary import bounded_factor


def norms(gradient):
    return gradient.double().flatten(1).norm(dim=1)


def gradients(scales, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(scales), 3, 4, 5, generator=generator)
    unit = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return unit * torch.tensor(scales).view(-1, 1, 1, 1)


MAGNITUDES = st.floats(-12, 6).map(lambda e: 10.**e)


@given(pairs=st.lists(st.tuples(MAGNITUDES, MAGNITUDES), min_size=1, max_size=5),
       fraction=st.floats(0, 10), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_bound_holds_for_each_image(pairs, fraction, seed):
    prior = gradients([p for p, _ in pairs], seed)
    adversarial = gradients([a for _, a in pairs], seed + 100)
    factor = bounded_factor(prior, adversarial, fraction)
    assert factor.shape == (len(pairs), 1, 1, 1)
    assert ((factor >= 0) & (factor <= 1)).all()
    bound = fraction * norms(prior)
    assert (norms(factor * adversarial) <= bound * (1 + 1e-5) + 1e-37).all()
    # It is the largest such factor: either nothing is cut, or the bound is met.
    for f, pull, limit in zip(factor.flatten(), norms(factor * adversarial), bound):
        assert f == 1 or pull == pytest.approx(float(limit), rel=1e-4, abs=1e-37)


def test_by_hand():
    prior, adversarial = gradients([2., 2., 2., 0.5]), gradients([0.5, 1., 4., 10.], seed=1)
    factor = bounded_factor(prior, adversarial, 0.5)  # bounds 1, 1, 1 and 0.25
    assert factor.flatten().tolist() == pytest.approx([1., 1., 0.25, 0.025], rel=1e-5)


def test_gradients_below_the_bound_are_left_alone():
    factor = bounded_factor(gradients([2., 3.]), gradients([0.19, 0.], seed=1), 0.1)
    assert torch.equal(factor, torch.ones(2, 1, 1, 1))


def test_no_bound():
    factor = bounded_factor(gradients([1e-9, 1.]), gradients([1e9, 1.], seed=1), None)
    assert torch.equal(factor, torch.ones(2, 1, 1, 1))


def test_bound_of_zero():
    prior, adversarial = gradients([2., 3.]), gradients([1., 1e-6], seed=1)
    assert not bounded_factor(prior, adversarial, 0.).any()


@pytest.mark.parametrize('prior', [0., 1.])
def test_no_adversarial_gradient(prior):
    """Nothing to bound, and nothing that is not a number."""
    adversarial = torch.zeros(2, 3, 4, 5)
    factor = bounded_factor(gradients([prior, prior]), adversarial, 0.3)
    assert torch.isfinite(factor).all()
    assert not (factor * adversarial).any()


def test_no_gradient_of_the_prior():
    factor = bounded_factor(torch.zeros(1, 3, 4, 5), gradients([5.]), 0.3)
    assert not factor.any()

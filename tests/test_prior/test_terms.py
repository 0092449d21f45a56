# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tests of the registered terms of the synthesis loss."""
import pytest
import torch

from psaq_mm.errors import UserError
from psaq_mm.prior import (
    AttentionRecord,
    PatchSimilarityPrior,
    PriorState,
    TotalVariationPrior,
    patch_similarity_entropy,
    patch_similarity_entropy_v1,
    total_variation,
)
from psaq_mm.registry import PRIORS


def _generators():
    return [torch.Generator().manual_seed(seed) for seed in (9, 10)]


def _state(seed=0, **kwargs):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 14, 14, generator=g)
    valid = torch.ones(1, 9, dtype=torch.bool)
    valid[0, 6:] = False
    attention = [
        AttentionRecord(1 + torch.randn(8, 9, 3, 4, generator=g)),
        AttentionRecord(1 + torch.randn(2, 9, 6, 4, generator=g), valid),
    ]
    fields = dict(images=images, attention=attention, generators=_generators())
    fields.update(kwargs)
    return PriorState(**fields)


def test_registered_with_the_papers_defaults():
    term = PRIORS.build(dict(type='PatchSimilarityPrior'))
    assert isinstance(term, PatchSimilarityPrior)
    assert (term.weight, term.bins, term.bandwidth, term.form, term.points) == (
        1., 256, 0.01, 'binned', 10)
    term = PRIORS.build(dict(type='TotalVariationPrior', weight=0.1))
    assert isinstance(term, TotalVariationPrior)
    assert (term.weight, term.low, term.high) == (0.1, 2500., 3000.)
    assert TotalVariationPrior().weight == 0.025


def test_needs_attention():
    assert PatchSimilarityPrior().needs_attention
    assert not TotalVariationPrior().needs_attention


@pytest.mark.parametrize('form, function, kwargs', [
    ('binned', patch_similarity_entropy, dict(bins=64)),
    ('v1', patch_similarity_entropy_v1, dict(points=12)),
])
def test_patch_similarity_is_the_negative_sum_over_blocks(form, function, kwargs):
    state = _state()
    expected = sum(
        function(record.output.mean(2), 2, record.valid, bandwidth=0.02, **kwargs)
        for record in state.attention)
    term = PatchSimilarityPrior(weight=0.5, form=form, bandwidth=0.02, **kwargs)
    torch.testing.assert_close(term(state), -0.5 * expected)


def test_patch_similarity_gradient_reaches_every_head_of_every_block():
    state = _state()
    for record in state.attention:
        record.output.requires_grad_()
    PatchSimilarityPrior()(state).sum().backward()
    first, second = (record.output.grad for record in state.attention)
    assert (first.abs().sum((0, 1, 3)) > 0).all()
    assert (second[:, :6].abs().sum((0, 1, 3)) > 0).all()
    assert (second[:, 6:] == 0).all()


def test_half_precision_attention():
    state = _state()
    for record in state.attention:
        record.output = record.output.bfloat16()
    exact = _state(attention=[
        AttentionRecord(record.output.float(), record.valid) for record in state.attention
    ])
    term = PatchSimilarityPrior()
    assert term(state).dtype == torch.float32
    torch.testing.assert_close(term(state), term(exact))


def test_a_model_without_attention_is_refused():
    with pytest.raises(UserError, match='no attention block'):
        PatchSimilarityPrior()(_state(attention=[]))


def test_total_variation_term():
    state = _state()
    draws = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in _generators()])
    target = 5000 + 1000 * draws.float()
    scale = 32 ** 0.5 * 16  # to 32 images of 224 pixels
    expected = 0.1 * (scale * total_variation(state.images) - target).abs()
    term = TotalVariationPrior(weight=0.1, low=5000., high=6000.)
    torch.testing.assert_close(term(state), expected)
    assert (term(state) != expected).all()  # a new target in each step


def test_total_variation_pulls_towards_the_target():
    images = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    term = TotalVariationPrior(weight=1., low=1500., high=1500.)
    target = 1500 / (32 ** 0.5 * 16)
    assert (total_variation(images) > 1.5 * target).all()
    images.requires_grad_()
    optimizer = torch.optim.Adam([images])
    for step in range(100):
        optimizer.param_groups[0]['lr'] = 0.05 * (1 - step / 100)
        optimizer.zero_grad()
        term(_state(images=images)).sum().backward()
        optimizer.step()
    assert total_variation(images).tolist() == pytest.approx([target] * 2, rel=0.05)


@pytest.mark.parametrize('term, kwargs, message', [
    (PatchSimilarityPrior, dict(bins=3), 'bins must be an integer of at least 8, got 3'),
    (PatchSimilarityPrior, dict(bins=64.), 'bins must be an integer .* got 64.0'),
    (PatchSimilarityPrior, dict(bins=True), 'bins must be an integer'),
    (PatchSimilarityPrior, dict(bandwidth=0), 'bandwidth must be a number above 0, got 0'),
    (PatchSimilarityPrior, dict(bandwidth='0.1'), "bandwidth must be a number .* got '0.1'"),
    (PatchSimilarityPrior, dict(form='exact'), "form must be 'binned' or 'v1', got 'exact'"),
    (PatchSimilarityPrior, dict(points=1), 'points must be an integer of at least 2, got 1'),
    (PatchSimilarityPrior, dict(weight=-1), 'weight must be a number of at least 0, got -1'),
    (TotalVariationPrior, dict(weight=float('nan')), 'weight must be a number'),
    (TotalVariationPrior, dict(low=-1.), 'low must be a number of at least 0'),
    (TotalVariationPrior, dict(low=10., high=9.), 'high must be a number of at least low'),
])
def test_bad_arguments_name_their_key(term, kwargs, message):
    with pytest.raises(UserError, match=rf'^synthesis\.priors: {message}'):
        term(**kwargs)

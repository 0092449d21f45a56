# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tests of the patch similarity entropy of one attention block."""
import math

import pytest
import torch

from psaq_mm.prior.density import binned_density, entropy
from psaq_mm.prior.patch_similarity import (
    cosine_similarity_matrix,
    patch_similarity_entropy,
    patch_similarity_entropy_v1,
)


def _tokens(windows, tokens=9, dim=8, seed=0):
    """Tokens whose spread differs from window to window, (windows, tokens, dim)."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 2, windows, dtype=torch.float64)[:, None, None]
    return 1 + spread * torch.randn(windows, tokens, dim, generator=g, dtype=torch.float64)


BOTH = pytest.mark.parametrize('form', [patch_similarity_entropy, patch_similarity_entropy_v1])


def test_cosine_similarity_matrix():
    u = _tokens(3)
    expected = torch.cosine_similarity(u[:, None], u[:, :, None], dim=-1)
    torch.testing.assert_close(cosine_similarity_matrix(u), expected)


def test_cosine_similarity_of_a_zero_token_is_zero():
    u = _tokens(1)
    u[0, 2] = 0
    u.requires_grad_()
    similarities = cosine_similarity_matrix(u)
    assert (similarities[0, 2] == 0).all()
    similarities.sum().backward()
    assert u.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    u = _tokens(4).to(dtype)
    expected = patch_similarity_entropy(u.float(), 2)
    torch.testing.assert_close(patch_similarity_entropy(u, 2), expected)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(patch_similarity_entropy(u.float(), 2), expected)


def test_entropy_is_that_of_all_entries_of_an_image():
    u = _tokens(6)
    entries = torch.stack([
        torch.cat([cosine_similarity_matrix(u[b * 3 + w][None]).flatten() for w in range(3)])
        for b in range(2)
    ])
    expected = entropy(binned_density(entries, 128), 2 / 127)
    torch.testing.assert_close(patch_similarity_entropy(u, 2, bins=128), expected)


@BOTH
def test_every_image_gets_what_it_gets_alone(form):
    u = _tokens(6)
    together = form(u, 3)
    alone = torch.cat([form(u[2 * b:2 * b + 2], 1) for b in range(3)])
    torch.testing.assert_close(together, alone)
    assert together.unique().numel() == 3


@BOTH
def test_order_of_windows_inside_an_image_is_irrelevant(form):
    u = _tokens(6)
    torch.testing.assert_close(form(u, 2), form(u[[2, 0, 1, 5, 4, 3]], 2))


@BOTH
def test_windows_belong_to_the_image_they_lie_in(form):
    u = _tokens(6)
    before = form(u, 2)
    swapped = form(u[[0, 1, 3, 2, 4, 5]], 2)  # the third window of one, the first of the other
    assert ((before - swapped).abs() > 1e-3).all()
    # Only the first image's entropy depends on the first three windows.
    for image, mine in enumerate([slice(0, 3), slice(3, 6)]):
        leaf = u.clone().requires_grad_()
        form(leaf, 2)[image].backward()
        others = leaf.grad.clone()
        others[mine] = 0
        assert leaf.grad[mine].abs().sum() > 0
        assert (others == 0).all()


@BOTH
def test_padded_tokens_equal_removed_tokens(form):
    u = _tokens(4).requires_grad_()
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, [1, 4, 8]] = False
    masked = form(u, 2, valid)
    torch.testing.assert_close(masked, form(u[:, [0, 2, 3, 5, 6, 7]], 2))
    masked.sum().backward()
    assert (u.grad[:, ~valid[0]] == 0).all()
    assert (u.grad[:, valid[0]] != 0).any(-1).all()


def test_padding_may_differ_from_window_to_window():
    u = _tokens(4)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 4:] = False
    entries = torch.stack([
        torch.cat([
            cosine_similarity_matrix(u[[2 * b]]).flatten(),
            cosine_similarity_matrix(u[[2 * b + 1], :4]).flatten()
        ]) for b in range(2)
    ])
    torch.testing.assert_close(
        patch_similarity_entropy(u, 2, valid), entropy(binned_density(entries), 2 / 255))


@BOTH
def test_a_window_of_padding_alone_is_harmless(form):
    u = _tokens(6)
    u[[1, 4]] = 0
    u.requires_grad_()
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1] = False
    result = form(u, 2, valid)
    torch.testing.assert_close(result, form(u[[0, 2, 3, 5]], 2))
    result.sum().backward()
    assert u.grad.isfinite().all()
    assert (u.grad[[1, 4]] == 0).all()


@BOTH
def test_nothing_but_padding_is_harmless(form):
    u = _tokens(2).requires_grad_()
    result = form(u, 1, torch.zeros(2, 9, dtype=torch.bool))
    assert result.isfinite().all()
    result.sum().backward()
    assert (u.grad == 0).all()


@BOTH
def test_all_valid_equals_no_mask(form):
    u = _tokens(4)
    torch.testing.assert_close(form(u, 2, torch.ones(2, 9, dtype=torch.bool)), form(u, 2))


@BOTH
def test_unfit_shapes_are_refused(form):
    with pytest.raises(ValueError, match='5 windows .* 2 images'):
        form(_tokens(5), 2)
    for shape in [(3, 9), (2, 8), (18, )]:
        with pytest.raises(ValueError, match='num_windows'):
            form(_tokens(4), 2, torch.ones(*shape, dtype=torch.bool))


def _v1_entropy(u, batch_size, points=10, h=0.01):
    """V1's formula with loops, one number at a time; the grid is that of the image."""
    u = u.tolist()
    per_image = len(u) // batch_size
    samples = [[] for _ in range(batch_size)]
    for index, window in enumerate(u):
        for a in window:
            for b in window:
                dot = sum(x * y for x, y in zip(a, b))
                norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
                samples[index // per_image].append(dot / norms)
    result = []
    for image in samples:
        low, high = min(image), max(image)
        step = (high - low) / (points - 1)
        f = []
        for k in range(points):
            p = sum(math.exp(-((low + k * step - s) / h)**2 / 2) for s in image)
            p = p / (len(image) * h * math.sqrt(2 * math.pi)) + 1e-4
            f.append(-p * math.log(p))
        result.append(sum((f[k] + f[k + 1]) / 2 * step for k in range(points - 1)))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize('points, h', [(10, 0.01), (25, 0.05)])
def test_v1_form_is_v1s_formula(points, h):
    u = _tokens(4)
    torch.testing.assert_close(
        patch_similarity_entropy_v1(u, 2, points=points, bandwidth=h),
        _v1_entropy(u, 2, points, h))


def test_v1_gradient():
    g = torch.Generator().manual_seed(1)
    # The grid has no gradient in V1. So the first window, which stays as it is, holds both of
    # its ends (a token is opposite to another), and the gradient is checked on the second.
    fixed = torch.randn(1, 4, 5, generator=g, dtype=torch.float64)
    fixed[0, 3] = -fixed[0, 2]
    u = torch.randn(1, 4, 5, generator=g, dtype=torch.float64, requires_grad=True)

    def function(x):
        return patch_similarity_entropy_v1(torch.cat([fixed, x]), 1, bandwidth=0.1)

    assert torch.autograd.gradcheck(function, (u, ))


@BOTH
def test_same_bits_twice(form):
    u = _tokens(4).float()
    first, second = (u.clone().requires_grad_() for _ in range(2))
    form(first, 2).sum().backward()
    form(second, 2).sum().backward()
    assert torch.equal(first.grad, second.grad)


def test_ascent_spreads_the_similarities():
    """What the prior is for: tokens alike at first become diverse."""
    u = (1 + 0.3 * torch.randn(8, 9, 8, generator=torch.Generator().manual_seed(3)))
    u.requires_grad_()
    before = cosine_similarity_matrix(u.detach()).std()
    optimizer = torch.optim.Adam([u], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (-patch_similarity_entropy(u, 2).sum()).backward()
        optimizer.step()
    assert cosine_similarity_matrix(u.detach()).std() > 2 * before

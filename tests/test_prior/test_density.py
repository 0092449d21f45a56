# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tests of the density estimates and the entropy."""
import functools
import math

import pytest
import torch

from psaq_mm.prior.density import (
    binned_density,
    entropy,
    exact_density,
    gaussian_kernel,
    linear_binning,
)


def _cosines(kind, windows=8, tokens=49, dim=32):
    """Cosine similarities of tokens drawn in several ways, (2, windows*tokens*tokens)."""
    g = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shape = (2 * windows, tokens, dim)
    u = {
        'broad': lambda: randn(*shape),
        'one_sided': lambda: randn(*shape) + 1,
        'tight': lambda: 0.4 * randn(*shape) + 1,
        'bimodal': lambda: (randn(2 * windows, 4, dim).repeat_interleave(13, 1)[:, :tokens] +
                            0.3 * randn(*shape)),
    }[kind]()
    u = torch.nn.functional.normalize(u, dim=-1)
    return (u @ u.transpose(1, 2)).reshape(2, -1)


def _entropy_and_gradient(values, density, grid):
    values = values.clone().requires_grad_()
    result = entropy(density(values), grid)
    result.sum().backward()
    return result.detach(), values.grad


@functools.cache
def _exact_entropy_and_gradient(kind):
    """The reference on 2001 points, which takes most of this file's time."""
    grid = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    return _entropy_and_gradient(_cosines(kind), lambda v: exact_density(v, grid), grid)


@pytest.mark.parametrize('kind', ['broad', 'one_sided', 'tight', 'bimodal'])
@pytest.mark.parametrize('bins, least', [(256, 0.98), (1024, 0.998)])
def test_binned_agrees_with_exact(kind, bins, least):
    values = _cosines(kind)
    expected, expected_grad = _exact_entropy_and_gradient(kind)
    got, grad = _entropy_and_gradient(values, lambda v: binned_density(v, bins), 2 / (bins - 1))
    assert (got - expected).abs().max() < 0.01
    # A patch's similarity to itself is 1 whatever the images: its gradient goes nowhere.
    off = values < 1 - 1e-9
    correlation = torch.corrcoef(torch.stack([grad[off], expected_grad[off]]))[0, 1]
    assert correlation > least
    assert grad[off].norm() / expected_grad[off].norm() == pytest.approx(1, abs=0.03)


def test_binned_density_is_the_exact_one_where_values_lie_on_the_grid():
    # No value moves then, so both must agree to the last digits, at the leaking edges too.
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)
    index = torch.tensor([[0, 3, 3, 100, 255], [255, 255, 255, 254, 17]])
    values = grid[index]
    torch.testing.assert_close(
        binned_density(values), exact_density(values, grid), rtol=1e-6, atol=1e-6)


def test_mass_beyond_the_edges_leaks():
    step = 2 / 255
    inside = binned_density(torch.zeros(1, 4, dtype=torch.float64))
    assert torch.trapezoid(inside, dx=step, dim=-1).item() == pytest.approx(1, abs=1e-6)
    at_edge = binned_density(torch.ones(1, 4, dtype=torch.float64))
    assert torch.trapezoid(at_edge, dx=step, dim=-1).item() == pytest.approx(0.5, abs=1e-6)


def test_linear_binning_by_hand():
    # Grid -1, -0.5, 0, 0.5, 1. -0.5 lies on a point, 0.1 a fifth of the way from 0 to 0.5,
    # 0.875 three quarters of the way from 0.5 to 1.
    values = torch.tensor([[-0.5, 0.1, 0.875]], dtype=torch.float64)
    torch.testing.assert_close(
        linear_binning(values, 5),
        torch.tensor([[0., 1., 0.8, 0.2 + 0.25, 0.75]], dtype=torch.float64))


def test_linear_binning_keeps_the_ends_and_rounding_errors_inside():
    values = torch.tensor([[-1 - 1e-6, -1., 1., 1 + 1e-6]])
    torch.testing.assert_close(linear_binning(values, 5), torch.tensor([[2., 0., 0., 0., 2.]]))


def test_linear_binning_gradient_by_hand():
    values = torch.tensor([[-0.6, 0.1, 0.7]], requires_grad=True)
    upstream = torch.tensor([[1., 2., 4., 8., 16.]])
    (linear_binning(values, 5) * upstream).sum().backward()
    # Difference of the upstream gradient over the cell, times (5 - 1) / 2.
    torch.testing.assert_close(values.grad, torch.tensor([[2., 8., 16.]]))


@pytest.mark.parametrize('bins', [8, 256, 257, 1024])
def test_linear_binning_gradcheck(bins):
    g = torch.Generator().manual_seed(bins)
    cell = torch.randint(0, bins - 1, (3, 7), generator=g)
    inside = 0.2 + 0.6 * torch.rand(3, 7, generator=g, dtype=torch.float64)  # away from kinks
    values = ((cell + inside) * 2 / (bins - 1) - 1).requires_grad_()
    valid = torch.rand(3, 7, generator=g) > 0.3
    assert torch.autograd.gradcheck(lambda v: linear_binning(v, bins), (values, ))
    assert torch.autograd.gradcheck(lambda v: linear_binning(v, bins, valid), (values, ))


def test_exact_density_gradcheck_and_chunks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 5, generator=g, dtype=torch.float64).requires_grad_()
    valid = torch.rand(2, 3, 5, generator=g) > 0.3
    grid = torch.linspace(0, 1, 5, dtype=torch.float64)
    whole = exact_density(values, grid, 0.2, valid)
    assert torch.autograd.gradcheck(lambda v: exact_density(v, grid, 0.2, valid), (values, ))
    monkeypatch.setattr('psaq_mm.prior.density._EXACT_CHUNK', 40)  # 4 values of 15 at a time
    torch.testing.assert_close(exact_density(values, grid, 0.2, valid), whole)
    assert torch.autograd.gradcheck(lambda v: exact_density(v, grid, 0.2, valid), (values, ))


@pytest.mark.parametrize('low, high', [(-1., 1.), (-0.2, 0.9), (0.9, 1.), (0.5, 0.5)])
@pytest.mark.parametrize('dtype, close', [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_exact_density_is_the_textbooks_formula(low, high, dtype, close):
    """From grids of which a kernel reaches one point to those of which it reaches all."""
    g = torch.Generator().manual_seed(1)
    values = torch.rand(2, 3, 40, generator=g, dtype=torch.float64) * (high - low + 0.1) + low
    slope = torch.randn(2, 10, generator=g, dtype=torch.float64)
    grid = torch.linspace(low, high, 10, dtype=torch.float64)
    results = []
    for density, x in (
            (lambda v: torch.exp(-0.5 * ((grid[:, None] - v.reshape(2, 1, -1)) / 0.01)**2).mean(2)
             / (0.01 * math.sqrt(2 * math.pi)), values.clone()),
            (lambda v: exact_density(v, grid), values.to(dtype))):
        p = density(x.requires_grad_())
        (p * slope).sum().backward()
        results.append((p.detach().double(), x.grad.double()))
    for expected, got in zip(*results):
        assert (got - expected).abs().max() <= close * max(1, expected.abs().max())


@pytest.mark.parametrize('density', [
    lambda v, m: binned_density(v, 64, valid=m),
    lambda v, m: exact_density(v, torch.linspace(-1, 1, 33).double(), valid=m),
])
def test_valid_counts_as_if_the_others_were_not_there(density):
    values = _cosines('broad', windows=1).reshape(2, 7, 343)
    valid = torch.zeros(7, 343, dtype=torch.bool)
    valid[:, ::3] = True
    valid[4] = False
    values.requires_grad_()
    masked = density(values, valid)
    kept = values[:, [0, 1, 2, 3, 5, 6], ::3]
    torch.testing.assert_close(masked, density(kept, None))
    entropy(masked, 0.01).sum().backward()
    assert (values.grad[:, ~valid] == 0).all()
    assert (values.grad[:, valid] != 0).any()


def test_no_valid_value_at_all_is_harmless():
    values = torch.rand(2, 6, requires_grad=True)
    density = binned_density(values, valid=torch.zeros(2, 6, dtype=torch.bool))
    assert (density == 0).all()
    entropy(density, 2 / 255).sum().backward()
    assert (values.grad == 0).all()


def test_nan_stays_nan_and_stays_in_its_image():
    values = torch.rand(2, 6)
    values[0, 2] = float('nan')
    density = binned_density(values)
    assert density[0].isnan().any()
    assert not density[1].isnan().any()


def test_saved_memory_is_one_byte_per_value():
    saved = []
    values = torch.rand(4, 5000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_binning(values, 256)
    assert sum(t.numel() * t.element_size() for t in saved) == values.numel()


def test_float32_counts_match_float64():
    values = _cosines('broad', windows=64)
    torch.testing.assert_close(
        binned_density(values.float()).double(), binned_density(values), rtol=1e-4, atol=1e-4)


def test_gaussian_kernel():
    kernel = gaussian_kernel(0.005, 0.01)
    assert kernel.sum().item() == pytest.approx(1)
    torch.testing.assert_close(kernel, kernel.flip(0))
    middle = kernel.numel() // 2
    assert (kernel[middle + 2] / kernel[middle]).item() == pytest.approx(math.exp(-0.5))
    assert (kernel[middle + 4] / kernel[middle]).item() == pytest.approx(math.exp(-2))


def test_entropy_of_known_densities():
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    uniform = torch.full((1, 4001), 0.5, dtype=torch.float64)
    assert entropy(uniform, grid, eps=0.).item() == pytest.approx(math.log(2))
    sigma = 0.05
    normal = torch.exp(-0.5 * (grid / sigma)**2)[None] / (sigma * math.sqrt(2 * math.pi))
    expected = 0.5 * math.log(2 * math.pi * math.e * sigma**2)
    assert entropy(normal, 2 / 4000, eps=1e-12).item() == pytest.approx(expected, abs=1e-6)
    # V1's 1e-4, by hand: two points a distance of 1 apart.
    p = torch.tensor([[0.2, 0.7]], dtype=torch.float64)
    hand = -(0.2001 * math.log(0.2001) + 0.7001 * math.log(0.7001)) / 2
    assert entropy(p, 1.).item() == pytest.approx(hand)
    assert entropy(p, torch.tensor([3., 4.])).item() == pytest.approx(hand)

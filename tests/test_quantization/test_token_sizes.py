# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sizes of tokens, and the quantizer that divides by them."""
import copy

import pytest
import torch

from psaq_mm.errors import UserError
from psaq_mm.quantization import Quantizer, QuantSpec, fake_quantize, token_sizes

TOKENS = dict(bits=3, symmetric=False, granularity='per_token')


def calibrated(x, softmax=False, **spec):
    quantizer = Quantizer(QuantSpec(**spec), 1, softmax)
    quantizer.start_observing()
    quantizer(x)
    quantizer.finish_observing()
    return quantizer


def test_sizes_by_hand():
    x = torch.tensor([[3., -4.], [0., 0.], [1., 1.]])
    assert token_sizes(x, False).flatten().tolist() == pytest.approx([12.5**0.5, 1e-6, 1.])
    assert token_sizes(x.abs(), True).flatten().tolist() == pytest.approx([4., 1e-6, 1.])


def test_squares_do_not_overflow_in_half_precision():
    sizes = token_sizes(torch.full((1, 4), 3e4).half(), False)
    assert sizes.dtype == torch.float16 and sizes.item() == pytest.approx(3e4, rel=1e-3)
    assert token_sizes(torch.zeros(1, 4).half(), False) > 0


@pytest.mark.parametrize('softmax', [False, True])
def test_it_is_one_range_of_tokens_over_their_sizes(softmax):
    """Against every token on its own, and a quantizer of one range on what is left."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16) * torch.logspace(-2, 2, 5)[:, None]
    x = x.softmax(-1) if softmax else x
    sizes = [row.max() if softmax else row.square().mean().sqrt() for row in x.flatten(0, 1)]
    quantizer = calibrated(x, softmax, **TOKENS)
    left = torch.stack([row / size for row, size in zip(x.flatten(0, 1), sizes)])
    plain = calibrated(left, **dict(TOKENS, granularity='per_tensor'))
    assert quantizer.scale.shape == ()
    assert torch.allclose(quantizer.scale, plain.scale)
    expected = [plain(row) * size for row, size in zip(left, sizes)]
    assert torch.allclose(quantizer(x).flatten(0, 1), torch.stack(expected), rtol=1e-5)


def test_each_token_keeps_its_own_precision():
    """Tokens of 0.01 beside tokens of 100: one range for all makes zeros of the small ones."""
    torch.manual_seed(0)
    x = torch.randn(64, 32) * torch.logspace(-2, 2, 64)[:, None]
    errors = {}
    for granularity in ('per_token', 'per_tensor'):
        quantizer = calibrated(x, **dict(TOKENS, granularity=granularity))
        errors[granularity] = ((quantizer(x) - x).norm(dim=-1) / x.norm(dim=-1))
    assert errors['per_tensor'][:32].min() > 0.9
    assert errors['per_token'].max() < 0.4


def test_an_even_row_of_attention_is_not_rounded_to_zero():
    even, sharp = torch.full((1, 49), 1 / 49), torch.eye(49)[:1]
    quantizer = calibrated(torch.cat([even, sharp]), True, **TOKENS)
    assert torch.allclose(quantizer(even), even)
    assert torch.allclose(quantizer(sharp), sharp)


def test_scaling_a_token_scales_what_comes_out():
    torch.manual_seed(0)
    x = torch.randn(7, 12)
    quantizer = calibrated(x, **TOKENS)
    factors = 2. ** torch.arange(7)[:, None]  # exact in float
    assert torch.equal(quantizer(x * factors), quantizer(x) * factors)
    assert torch.equal(quantizer(torch.zeros(2, 12)), torch.zeros(2, 12))


def test_gradients_reach_input_and_range():
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    x[0] = 0  # padding
    quantizer = calibrated(x, **TOKENS)
    for tensor in (quantizer.scale, quantizer.zero_point, x.requires_grad_(True)):
        tensor.requires_grad_(True)
    quantizer(x).square().sum().backward()
    for tensor in (x, quantizer.scale, quantizer.zero_point):
        assert torch.isfinite(tensor.grad).all()
    assert x.grad[1:].abs().min() > 0


def test_learned_ranges_compute_what_fixed_ones_do():
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    quantizer = calibrated(x, **TOKENS)
    twin = copy.deepcopy(quantizer)
    twin.scale.requires_grad_(True)
    assert torch.equal(twin(x), quantizer(x))
    sizes = token_sizes(x, False)
    assert torch.equal(quantizer(x), sizes * fake_quantize(
        x / sizes, quantizer.scale, quantizer.zero_point, (0, 7)))


@pytest.mark.parametrize('own', ['per_token', 'per_tensor'])
def test_state_dict_of_other_granularity_is_refused(own):
    other = dict(per_token='per_tensor', per_tensor='per_token')[own]
    state = calibrated(torch.randn(3, 8), **dict(TOKENS, granularity=own)).state_dict()
    target = Quantizer(QuantSpec(**dict(TOKENS, granularity=other)))
    with pytest.raises(UserError, match=r'3 bits \(asymmetric(, per token)?\), the model'):
        target.load_state_dict(state)
    assert not target.calibrated

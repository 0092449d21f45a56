# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import pytest
import torch
from torch import nn

from psaq_mm.student import equalize_channels

READERS = {'norm': 'fc'}


class Block(nn.Module):
    """A LayerNorm of 8 channels, the second far wider than the others, and its reader."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1., 24., 1., 1., 1., 1., 1., 1.]))
            self.norm.bias.copy_(0.1 * torch.arange(8))

    def forward(self, x):
        return self.fc(self.norm(x))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def images():
    return torch.randn(6, 50, 8, generator=torch.Generator().manual_seed(1))


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize('batch_size', [1, 4, 6])
def test_scale_moves(block, images, batch_size):
    before, expected = state_of(block), block(images).detach()
    seen = []

    def forward(batch):
        seen.append(len(batch))
        return [block(batch)]

    found = equalize_channels(block, READERS, images, forward, 1.5, batch_size)
    assert sum(seen[:-2]) == 6 and max(seen) == min(batch_size, 6)
    assert seen[-2:] == [1, 1]  # what it computes, before and after
    assert found == {'norm': 1}
    factor = before['norm.weight'] / block.norm.weight.detach()
    # About 24 times as wide as the median, and 1.5 times are left.
    assert factor[1] == pytest.approx(24 / 1.5, rel=0.15)
    assert (factor[torch.arange(8) != 1] == 1).all()
    torch.testing.assert_close(block.norm.bias.detach() * factor, before['norm.bias'])
    torch.testing.assert_close(block.fc.weight.detach(), before['fc.weight'] * factor)
    assert torch.equal(block.fc.bias, before['fc.bias'])
    torch.testing.assert_close(block(images).detach(), expected)
    width = block.norm(images).detach().flatten(0, 1).square().mean(0).sqrt()
    assert width.max() <= 1.5 * width.median() * (1 + 1e-5)
    assert not block.norm._forward_hooks


def test_again_changes_nothing(block, images):
    equalize_channels(block, READERS, images, block, 1.5)
    before = state_of(block)
    assert equalize_channels(block, READERS, images, block, 1.5 * (1 + 1e-5)) == {'norm': 0}
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_within_the_limit_all_stays(block, images):
    before = state_of(block)
    assert equalize_channels(block, READERS, images, block, 100.) == {'norm': 0}
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_norm_without_a_bias(block, images):
    block.norm.bias = None
    expected = block(images).detach()
    assert equalize_channels(block, READERS, images, block, 1.5) == {'norm': 1}
    torch.testing.assert_close(block(images).detach(), expected)


def test_what_is_not_finite(block, images):
    before = state_of(block)
    images[3, 0, 0] = float('nan')
    with pytest.raises(ValueError, match='^norm: values are not finite$'):
        equalize_channels(block, READERS, images, block, 1.5)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert not block.norm._forward_hooks


def test_what_is_read_by_something_else_too(block, images):
    """The scale cannot move then, and the model is left as it was."""
    before = state_of(block)
    with pytest.raises(ValueError, match='^feature maps changed by .* %.*channel_limit=None$'):
        equalize_channels(block, READERS, images,
                          lambda batch: [block(batch), block.norm(batch)[..., 1:2]], 1.5)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_outputs_that_are_not_finite_after_the_move(value, block, images):
    """NaN is no small change."""
    before, calls = state_of(block), []

    def forward(batch):
        calls.append(len(batch))
        return [block(batch) * (value if len(calls) == 3 else 1.)]  # observed, before, after

    with pytest.raises(ValueError, match='^feature maps changed by (nan|inf) %'):
        equalize_channels(block, READERS, images, forward, 1.5, 6)
    assert len(calls) == 3
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('call', [1, 2, 3])
def test_interrupted(call, error, block, images):
    """Wherever it is, the model is as it was: the check of the move too."""
    before, calls = state_of(block), []

    def forward(batch):
        calls.append(len(batch))
        if len(calls) == call:
            raise error
        return [block(batch)]

    with pytest.raises(error):
        equalize_channels(block, READERS, images, forward, 1.5, 6)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert not block.norm._forward_hooks

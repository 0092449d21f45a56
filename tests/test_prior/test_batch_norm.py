# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""BatchNorm statistics and their divergence, against torch's own."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from psaq_mm import UserError
from psaq_mm.prior import (
    BatchNormPrior,
    BatchNormRecord,
    PriorState,
    channel_statistics,
    gaussian_divergence,
)


@pytest.mark.parametrize('shape', [(4, 3), (2, 3, 5), (2, 3, 5, 7), (1, 3, 1, 1)])
def test_statistics_are_those_of_torch(shape):
    """With momentum 1 torch stores what it saw (the variance unbiased)."""
    x = torch.randn(shape) * 3 + 1
    mean, var = channel_statistics(x)
    assert mean.shape == var.shape == (3, )
    count = x.numel() // 3
    if count > 1:
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[x.dim()]
        layer = kind(3, momentum=1.)
        layer(x)
        assert torch.allclose(mean, layer.running_mean, atol=1e-6)
        assert torch.allclose(var * count / (count - 1), layer.running_var, rtol=1e-5)
    else:
        assert torch.equal(mean, x.flatten())
        assert torch.equal(var, torch.zeros(3))
    assert channel_statistics(x.half())[0].dtype == torch.float32


@given(st.floats(-5, 5), st.floats(0.01, 9), st.floats(-5, 5), st.floats(0.01, 9))
def test_divergence_is_torchs(mean, var, running_mean, running_var):
    values = [torch.tensor([v], dtype=torch.float64)
              for v in (mean, var, running_mean, running_var)]
    ours = gaussian_divergence(*values, eps=0.)
    theirs = kl_divergence(Normal(values[0], values[1].sqrt()),
                           Normal(values[2], values[3].sqrt()))
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert float(ours) >= -1e-12


def test_divergence_by_hand():
    one, four = torch.tensor([1.]), torch.tensor([4.])
    zero = torch.tensor([0.])
    assert float(gaussian_divergence(zero, one, zero, one)) == 0
    # twice the spread and a shift of one: (4 - 1 - ln 4 + 1) / 2
    assert float(gaussian_divergence(one, four, zero, one, eps=0.)) \
        == pytest.approx((4 - math.log(4)) / 2)
    # finite where nothing varies
    assert math.isfinite(float(gaussian_divergence(zero, zero, zero, zero)))


def record(mean, var, channels=2):
    full = torch.ones(channels)
    return BatchNormRecord(full * mean, full * var, torch.zeros(channels), torch.ones(channels),
                           0.)


def state(*records):
    return PriorState(images=torch.zeros(1, 3, 2, 2), attention=[],
                      generators=[torch.Generator()], batch_norms=list(records))


def test_term_is_the_mean_over_layers_and_channels():
    # a layer of many channels counts as much as one of few
    value = BatchNormPrior(weight=2.)(state(record(0., 1., 8), record(1., 1., 2)))
    assert float(value) == pytest.approx(2 * (0 + 0.5) / 2)
    assert BatchNormPrior.needs_batch_norm
    assert not BatchNormPrior.needs_attention
    assert BatchNormPrior.couples_images


def test_descent_restores_the_statistics():
    layer = nn.BatchNorm2d(3).eval()
    layer.running_mean.copy_(torch.tensor([1., -2., 0.5]))
    layer.running_var.copy_(torch.tensor([4., 1., 0.25]))
    x = torch.randn(8, 3, 6, 6, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(200):
        mean, var = channel_statistics(x)
        loss = BatchNormPrior()(state(BatchNormRecord(
            mean, var, layer.running_mean, layer.running_var, layer.eps)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 1e-3
    assert torch.allclose(x.mean((0, 2, 3)), layer.running_mean, atol=0.05)
    assert torch.allclose(x.var((0, 2, 3)), layer.running_var, rtol=0.1)


def test_no_statistics():
    with pytest.raises(UserError, match='found no BatchNorm statistics'):
        BatchNormPrior()(state())
    with pytest.raises(UserError, match='weight must be'):
        BatchNormPrior(weight=-1)

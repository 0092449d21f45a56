# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pooling by matrices against torch's own."""
import pytest
import torch
from torch import nn

from psaq_mm.deploy.adaptive_pool import (
    ExportableAdaptivePool,
    pooling_matrix,
    replace_adaptive_pools,
)


@pytest.mark.parametrize('size', [1, 2, 3, 6, (2, 5)])
@pytest.mark.parametrize('height, width', [(7, 7), (16, 13), (2, 3)])
def test_is_torchs_pooling(size, height, width):
    x, pool = torch.randn(2, 3, height, width), nn.AdaptiveAvgPool2d(size)
    assert torch.allclose(ExportableAdaptivePool(pool)(x), pool(x), atol=1e-6)


def test_columns_are_means():
    assert torch.allclose(pooling_matrix(10, 4).sum(0), torch.ones(4))


def test_replaces_within_a_model():
    model = nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(2)), nn.AdaptiveAvgPool2d((None, 3)))
    x = torch.randn(1, 2, 7, 9)
    expected = model(x)
    replace_adaptive_pools(model)
    assert isinstance(model[0][0], ExportableAdaptivePool)
    assert isinstance(model[1], nn.AdaptiveAvgPool2d)  # keeps a side: left alone
    assert torch.allclose(model(x), expected, atol=1e-6)

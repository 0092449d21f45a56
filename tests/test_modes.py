# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Modes of models that last for a block."""
import pytest
from torch import nn

from psaq_mm.modes import evaluating


@pytest.mark.parametrize('gradients', [False, True])
def test_all_is_as_before_after_a_failure(gradients):
    one, other = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2).eval()
    one[0].bias.requires_grad_(False)
    other.requires_grad_(False)

    def state():
        return [(module.training, [p.requires_grad for p in module.parameters()])
                for model in (one, other) for module in model.modules()]

    before = state()
    with pytest.raises(KeyError), evaluating(one, other, gradients=gradients):
        assert not any(training for training, _ in state())
        assert all(needed is gradients for _, parameters in state() for needed in parameters)
        raise KeyError
    assert state() == before

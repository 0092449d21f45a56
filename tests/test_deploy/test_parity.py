# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What is said of the difference of two outputs."""
import pytest
import torch

from psaq_mm.deploy.parity import compare, lowest_sqnr
from psaq_mm.errors import UserError


def test_values():
    a = torch.tensor([[3., 4.]])
    rows = compare(['x', 'y'], [a, a], [a + torch.tensor([0., .5]), a])
    assert rows == [dict(output='x', max=0.5, mean=0.25, sqnr_db=20.),
                    dict(output='y', max=0., mean=0., sqnr_db=None)]
    assert lowest_sqnr(rows) == 20. and lowest_sqnr(rows[1:]) is None


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_no_numbers(value):
    """NaN is not equal, and no strict reader of JSON takes it."""
    with pytest.raises(UserError, match='scores_0 holds NaN or infinite'):
        compare(['scores_0'], [torch.zeros(2)], [torch.tensor([0., value])])


def test_outputs_that_are_missing():
    with pytest.raises(UserError, match='1 outputs, the model 2'):
        compare(['a', 'b'], [torch.zeros(1)] * 2, [torch.zeros(1)])

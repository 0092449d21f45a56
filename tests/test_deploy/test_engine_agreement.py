# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What counts as an engine that decides otherwise."""
import pytest
import torch
from conftest import plain_student
from small_models import swin

from psaq_mm.deploy.agreement import (
    SUMS_DIFFER,
    ExportError,
    describe_agreement,
    require_agreement,
    sums_in_another_order,
)
from psaq_mm.ops import named_quant_ops


def test_bound_is_relative_to_what_the_simulation_has_with_itself():
    row = dict(compared=2304, images=4, share=0.65, masks=0.7, own=dict(share=0.8, masks=0.75))
    require_agreement(row, 'a.xml')  # 0.8 * 0.8 and 0.8 * 0.75
    for key, bound in (('share', '62 %'), ('masks', '58 %')):  # less two errors of 1 %
        with pytest.raises(ExportError, match=f'^a.xml: .* 50.0 % .*, {bound} are expected'):
            require_agreement(dict(row, **{key: 0.5}), 'a.xml')
    with pytest.raises(ExportError, match='65.0 % .*, 78 % are expected'):
        require_agreement(dict(compared=2304, share=0.65), 'a.xml')
    few = dict(compared=16, own=dict(share=1.))
    require_agreement(dict(few, share=0.61), 'a.xml')  # 0.8 less twice 0.1
    with pytest.raises(ExportError, match='59.0 % .*, 60 % are expected'):
        require_agreement(dict(few, share=0.59), 'a.xml')
    assert describe_agreement(row) == (
        '65.0 % of 2304 decisions are the same, 70.0 % of the masks (80.0, 75.0 % where the '
        'simulation sums in another order)')


def test_sums_in_another_order():
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    model = plain_student(swin(), images)
    name, op = next(named_quant_ops(model))
    with torch.no_grad():
        expected, before = model(images), op(images)
        with sums_in_another_order(model):
            once = op(images)
        with sums_in_another_order(model):
            assert torch.equal(op(images), once)
            shaken = model(images)
        error = (once - before).abs() / before.abs().clamp_min(1e-6)
        assert 0.1 * SUMS_DIFFER < error.mean() < 2 * SUMS_DIFFER, name
        assert not torch.equal(shaken[-1], expected[-1])
        assert all(torch.equal(a, b) for a, b in zip(model(images), expected))

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What counts as an engine that decides otherwise."""
import numpy as np
import pytest
import torch
from conftest import plain_student
from small_models import swin

from psaq_mm.deploy.agreement import (
    SUMS_DIFFER,
    ExportError,
    compare_results,
    describe_agreement,
    require_agreement,
    sums_in_another_order,
    total,
)
from psaq_mm.ops import named_quant_ops
from psaq_mm.runtime import Detections
from psaq_mm.runtime.masks import Crop


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


def first(output):
    """The patch embedding of v1 also says how many tokens there are."""
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize('placement', ['operands', 'v1'])
def test_sums_in_another_order(placement):
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    model = plain_student(swin(), images, placement=placement)
    name, op = next(named_quant_ops(model))
    with torch.no_grad():
        expected, before = model(images), first(op(images))
        with sums_in_another_order(model):
            once = first(op(images))
        with sums_in_another_order(model):
            assert torch.equal(first(op(images)), once)
            shaken = model(images)
        error = (once - before).abs() / before.abs().clamp_min(1e-6)
        most = 2 if placement == 'operands' else 10  # layers within the patch embedding too
        assert 0.1 * SUMS_DIFFER < error.mean() < most * SUMS_DIFFER, name
        assert not torch.equal(shaken[-1], expected[-1])
        assert all(torch.equal(a, b) for a, b in zip(model(images), expected))


def test_the_total_of_images():
    """Of objects, not of images: three of four, and the masks of two of these three."""
    def detections(*objects):
        boxes, scores, crops = zip(*objects)
        return Detections(np.zeros((20, 40, 3), np.uint8), ['a'], np.array(boxes, np.float32),
                          np.array(scores, np.float32), np.zeros(len(boxes), np.int64), crops)

    full, half = np.ones((10, 10), bool), np.tri(10, dtype=bool)
    left = ([0, 0, 10, 10], 0.9, Crop(0, 0, full))
    right = ([20, 0, 30, 10], 0.8, Crop(20, 0, full))
    pairs = [(detections(left, right), detections(left)),
             (detections(left, right), detections(([0, 0, 10, 10], 0.7, Crop(0, 0, half)), right))]
    rows = [compare_results(*pair) for pair in pairs]
    assert [(row['compared'], row['share'], row['masks']) for row in rows] == \
        [(2, 0.5, 1.), (2, 1., 0.5)]
    found = total(rows)
    assert found == dict(compared=4, share=0.75, extra=0, score=pytest.approx(0.2),
                         masks=pytest.approx(2 / 3))
    del rows[0]['masks']
    assert 'masks' not in total(rows)
    assert total([dict(compared=0, share=1., extra=0, score=0.)])['share'] == 1

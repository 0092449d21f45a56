# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Agreement AP, beside values computed by hand."""
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData


@pytest.fixture(scope='module')
def agreement():
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    try:
        import agreement
        yield agreement
    finally:
        sys.path.remove(str(ROOT / 'benchmarks'))


def found(module, *objects):
    """Detections by mmdet's own form: class, score, then left, top, right and bottom of
    the box and of the mask that fills it, or another."""
    boxes = torch.tensor([o[2] for o in objects], dtype=torch.float32).reshape(-1, 4)
    masks = np.zeros((len(objects), 40, 40), dtype=bool)
    for mask, (*_, (left, top, right, bottom)) in zip(masks, objects):
        mask[top:bottom, left:right] = True
    sample = DetDataSample(pred_instances=InstanceData(
        labels=torch.tensor([o[0] for o in objects], dtype=torch.long),
        scores=torch.tensor([o[1] for o in objects], dtype=torch.float32),
        bboxes=boxes, masks=torch.from_numpy(masks)))
    return module.detections_of(sample)


A, B, C = (0, 0, 10, 10), (20, 20, 30, 30), (0, 20, 10, 30)
TWO_OF_THREE = (51 + 50 * 2 / 3) / 101
"""AP of a hit, a miss and a hit, of two objects: precision 1 up to recall 0.5, then 2/3."""


def test_values_by_hand(agreement):
    expected = [found(agreement, (0, .9, A), (0, .2, C)), found(agreement, (0, .5, B))]
    same = [found(agreement, (0, .9, A)), found(agreement, (0, .01, B))]
    for kind in ('bbox', 'segm'):
        assert agreement.agreement_ap(expected, same, kind) == pytest.approx(1)
    # C is none of the float model's, its score is below 0.3. The mask of B covers 64 of its
    # 100 pixels: a hit at IoU 0.5, 0.55 and 0.6 of the ten.
    other = [found(agreement, (0, .8, A), (0, .7, C)),
             found(agreement, (0, .6, B, (20, 20, 28, 28)))]
    assert agreement.agreement_ap(expected, other, 'bbox') == pytest.approx(TWO_OF_THREE)
    assert agreement.agreement_ap(expected, other, 'segm') == pytest.approx(
        .3 * TWO_OF_THREE + .7 * 51 / 101)


def test_mean_over_the_classes_of_the_float_model(agreement):
    expected = [found(agreement, (0, .9, A), (3, .9, B))]
    assert agreement.agreement_ap(expected, [found(agreement, (0, .9, A), (1, .9, C))],
                                  'bbox') == pytest.approx(.5)
    # An image where only the other model finds something costs as a miss does.
    assert agreement.agreement_ap(
        [*expected, found(agreement)],
        [found(agreement, (0, .8, A), (3, .5, B)), found(agreement, (3, .7, B))],
        'bbox') == pytest.approx((1 + .5) / 2)


def test_nothing_to_agree_on(agreement):
    nothing = [found(agreement)]
    assert math.isnan(agreement.agreement_ap(nothing, [found(agreement, (0, .9, A))], 'bbox'))
    assert agreement.agreement_ap([found(agreement, (0, .9, A))], nothing, 'segm') == 0

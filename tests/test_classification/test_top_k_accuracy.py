# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Top-k accuracy against cases counted by hand."""
import pytest
import torch
from mmengine.registry import METRICS

from psaq_mm.classification import TopKAccuracy
from psaq_mm.errors import UserError

# Classes by falling logit: 2 0 3 1, 1 3 2 0, 0 1 2 3, 3 2 1 0.
LOGITS = torch.tensor([[3., 1., 4., 2.], [0., 9., 1., 5.], [4., 3., 2., 1.], [-4., -3., -2., -1.]])
LABELS = [0, 1, 3, 1]  # second, first, fourth and third guess


def samples(logits=LOGITS, labels=LABELS):
    return [dict(logits=row, label=label) for row, label in zip(logits, labels)]


def evaluate(metric, *batches):
    for batch in batches:
        metric.process(None, batch)
    return metric.evaluate(sum(len(batch) for batch in batches))


def test_by_hand():
    metric = TopKAccuracy(topk=(1, 2, 3))
    assert evaluate(metric, samples()) == {
        'accuracy/top1': 25., 'accuracy/top2': 50., 'accuracy/top3': 75.}
    assert evaluate(metric, samples()[:1], samples()[1:2]) == {
        'accuracy/top1': 50., 'accuracy/top2': 100., 'accuracy/top3': 100.}  # a new start


def test_default():
    logits = torch.arange(12.).repeat(3, 1)  # 11 is the best guess, 7 the fifth
    metrics = evaluate(TopKAccuracy(), samples(logits, [11, 7, 6]))
    assert metrics == {'accuracy/top1': pytest.approx(100 / 3),
                       'accuracy/top5': pytest.approx(200 / 3)}


def test_one_k():
    assert evaluate(TopKAccuracy(topk=2), samples()) == {'accuracy/top2': 50.}


def test_images_that_fill_up_the_last_batch_do_not_count():
    metric = TopKAccuracy(topk=1)
    metric.process(None, samples())
    assert metric.evaluate(2) == {'accuracy/top1': 50.}  # of the first two


@pytest.mark.parametrize('topk, left', [((1, 4), ['top1']), ((5, 2, 9), ['top2']), (4, [])])
def test_no_metric_that_is_always_100(topk, left):
    metrics = evaluate(TopKAccuracy(topk=topk), samples())
    assert list(metrics) == [f'accuracy/{name}' for name in left]


def test_equal_logits_are_no_hit_for_all():
    metrics = evaluate(TopKAccuracy(topk=1), samples(torch.zeros(4, 4), [0, 1, 2, 3]))
    assert metrics == {'accuracy/top1': 25.}


@pytest.mark.parametrize('topk', [(), 0, (1, -1), (1, 2.5), 'all'])
def test_wrong_topk(topk):
    with pytest.raises(UserError, match='topk must be positive integers'):
        TopKAccuracy(topk=topk)


@pytest.mark.parametrize('label, message', [
    (None, 'has no label'), (4, 'label 4 is not among the 4 classes'), (-1, 'label -1 is not')])
def test_wrong_label(label, message):
    with pytest.raises(UserError, match=message):
        TopKAccuracy().process(None, [dict(logits=LOGITS[0], label=label)])


def test_config():
    metric = METRICS.build(dict(type='psaq_mm.TopKAccuracy', topk=(1, ), prefix='val'))
    assert evaluate(metric, samples()) == {'val/top1': 25.}

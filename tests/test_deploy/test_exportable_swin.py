# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The form of Swin that is traced against the hosts' own forward."""
import pytest
import torch
from demo_models import demo_model

from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.quantization import sqnr_db


def lowest(model, images, size, batch=1):
    subgraph = find_subgraph(model)
    with torch.no_grad():
        expected = subgraph.run(images)
        got = subgraph.exportable(size, batch)(images)
    assert [g.shape for g in got] == [e.shape for e in expected]
    return min(sqnr_db(e, g) for e, g in zip(expected, got))


@pytest.mark.parametrize('size', [(224, 224), (64, 96), (60, 93)])
@pytest.mark.parametrize('name', ['mask_rcnn_swin', 'upernet_swin'])
def test_float_is_the_host(name, size):
    """Without padding, with it, and with patches and merging padded too."""
    model = demo_model(name, quantized=False)
    images = torch.randn(2, 3, *size)
    assert lowest(model, images, size, batch=2) > 90
    assert lowest(model, images, None, batch=2) > 90  # any size


@pytest.mark.parametrize('name', ['swin', 'deit'])
def test_float_classifier_is_timms(name):
    model = demo_model(name, quantized=False)
    assert lowest(model, torch.randn(2, 3, 112, 112), (112, 112), batch=2) > 90


@pytest.mark.parametrize('settings', [
    {}, dict(roles=dict(input=dict(rotate=True))), dict(placement='v1'),
    dict(roles={role: dict(granularity='per_token') for role in ('input', 'attention')}),
    dict(roles=dict(input=dict(granularity='per_token', rotate=True))),
    dict(placement=['weight', 'input', 'query', 'attention', 'output',
                    'bias_table', 'logits'])])
@pytest.mark.parametrize('size', [(96, 128), (224, 224)])
def test_quantizers_stand_where_they_stood(settings, size):
    """Equal but for roundings that fall the other way; with padded windows and without."""
    model = demo_model('mask_rcnn_swin', **settings)
    assert lowest(model, torch.randn(1, 3, *size), size) > 30
    model = demo_model('swin', **settings)
    assert lowest(model, torch.randn(1, 3, 112, 112), (112, 112)) > 30


def test_model_is_left_alone():
    """Exporting permutes channels of patch merging, in a copy."""
    model = demo_model('mask_rcnn_swin')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_subgraph(model).exportable((64, 64))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)

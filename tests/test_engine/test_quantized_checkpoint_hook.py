# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the hook does to checkpoints that any mmengine runner is loading."""
import copy
import types

import pytest
import torch
from conftest import DEMO, ROOT, load_script
from mmengine.logging import MMLogger

from psaq_mm.engine import build_float_model, load_config
from psaq_mm.engine.hooks import QuantizedCheckpointHook

LAYOUTS = load_script(ROOT / 'benchmarks' / 'published_layouts.py')


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(1)
    return build_float_model(load_config(DEMO / 'upernet_swin_demo.py'))


def loaded(model, checkpoint):
    """A fresh model after a runner's load_checkpoint with the hook."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    runner = types.SimpleNamespace(model=fresh, logger=MMLogger.get_current_instance())
    QuantizedCheckpointHook().after_load_checkpoint(runner, checkpoint)
    fresh.load_state_dict(checkpoint['state_dict'])
    return fresh


@pytest.mark.parametrize('convert', [dict, LAYOUTS.to_swin_authors_detection])
@pytest.mark.parametrize('wrap', [
    lambda s: dict(state_dict=s, meta={}), lambda s: s, lambda s: dict(model=s),
    lambda s: dict(state_dict={f'module.{k}': v for k, v in s.items()})])
def test_float_checkpoints_of_published_layouts(model, convert, wrap):
    """The stock test scripts, too, see the weights in the model's own layout."""
    state = model.state_dict()
    fresh = loaded(model, wrap(convert(state)))
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())


def test_other_float_checkpoints_pass(model):
    checkpoint = dict(state_dict={'encoder.weight': torch.ones(1)})
    runner = types.SimpleNamespace(model=model, logger=MMLogger.get_current_instance())
    QuantizedCheckpointHook().after_load_checkpoint(runner, checkpoint)
    assert list(checkpoint['state_dict']) == ['encoder.weight']
    checkpoint = dict(epoch=3)  # mmengine itself says what is wrong
    QuantizedCheckpointHook().after_load_checkpoint(runner, checkpoint)
    assert checkpoint == dict(epoch=3)

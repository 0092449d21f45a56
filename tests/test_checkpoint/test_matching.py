# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import pytest
import torch
from torch import nn

from psaq_mm.checkpoint import first_differences, require_match
from psaq_mm.errors import UserError


@pytest.fixture
def model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model.register_buffer('relative_position_index', torch.arange(4))
    return model


def test_own_state_fits(model):
    assert first_differences(model, model.state_dict()) == ''
    require_match(model, model.state_dict(), 'a.pth')


def test_order_and_dtype_of_floats_do_not_matter(model):
    state = {name: value.half() if value.is_floating_point() else value
             for name, value in reversed(list(model.state_dict().items()))}
    assert first_differences(model, state) == ''


def test_what_the_model_knows_itself_may_be_missing(model):
    state = model.state_dict()
    del state['1.num_batches_tracked'], state['relative_position_index']
    assert first_differences(model, state) == ''
    state['head.relative_position_index'] = torch.arange(3)  # or be there in vain
    assert first_differences(model, state) == ''


def test_missing(model):
    state = model.state_dict()
    del state['0.bias']
    assert first_differences(model, state) == 'missing: 0.bias'
    assert first_differences(model, state, allow_extra=True) == 'missing: 0.bias'
    assert first_differences(model, {}) == 'missing: 0.weight, 0.bias, 1.weight and 5 more'


def test_shapes(model):
    state = model.state_dict()
    state['2.weight'] = torch.zeros(4, 2)
    assert first_differences(model, state) == (
        'of another shape: 2.weight ((4, 2) instead of (2, 4))')
    state['relative_position_index'] = torch.arange(5)
    assert 'relative_position_index ((5,) instead of (4,))' in first_differences(model, state)


def test_unexpected(model):
    state = dict(model.state_dict(), **{f'neck.{i}': torch.ones(1) for i in range(4)})
    assert first_differences(model, state) == 'unexpected: neck.0, neck.1, neck.2 and 1 more'
    assert first_differences(model, state, allow_extra=True) == ''


def test_integers_for_a_float_weight(model):
    """torch would copy the integers of a quantized file without a word."""
    state = model.state_dict()
    state['2.weight'] = torch.zeros(2, 4, dtype=torch.int8)
    assert first_differences(model, state) == (
        'of another type: 2.weight (torch.int8 instead of torch.float32)')
    assert first_differences(model, {**state, '2.weight': torch.zeros(2, 4).bool()})


def test_all_kinds_together(model):
    state = model.state_dict()
    del state['2.bias']
    state['0.weight'], state['extra'] = torch.zeros(1), torch.zeros(1)
    with pytest.raises(UserError) as caught:
        require_match(model, state, 'epoch_1.pth')
    assert str(caught.value) == (
        'epoch_1.pth is not a checkpoint of this model. missing: 2.bias; '
        'of another shape: 0.weight ((1,) instead of (4, 3, 1, 1)); unexpected: extra.\n'
        'Use the config that the checkpoint was trained or quantized with.')

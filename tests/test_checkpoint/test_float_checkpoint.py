# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import logging
import math

import pytest
import torch
from conftest import plain_student
from mmdet.models.backbones.swin import SwinTransformer
from mmengine.logging import MMLogger

import psaq_mm
from psaq_mm.checkpoint import MANIFEST_KEY, load_float_weights
from psaq_mm.errors import UserError


def swin(embed_dims=16, depths=(2, 2)):
    model = SwinTransformer(embed_dims=embed_dims, depths=depths, num_heads=(1, 2),
                            strides=(4, 2), out_indices=(0, 1))
    model.eval()
    return model


@pytest.fixture
def state():
    return {name: value.clone() for name, value in swin().state_dict().items()}


@pytest.fixture
def warnings(caplog):
    """Text of what is logged while the test runs."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        yield caplog
    logger.removeHandler(caplog.handler)


def saved(obj, tmp_path):
    torch.save(obj, tmp_path / 'swin.pth')
    return str(tmp_path / 'swin.pth')


def assert_loaded(model, state):
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def assert_refused(model, path, match):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=match) as caught:
        load_float_weights(model, path)
    assert str(caught.value).startswith(path)
    assert len(str(caught.value).splitlines()) <= 2
    assert_loaded(model, before)


@pytest.mark.parametrize('wrap', [
    lambda state: dict(meta=dict(epoch=3), state_dict=state),
    lambda state: dict(model=state, optimizer={}),
    lambda state: state,
    lambda state: dict(state_dict={f'module.{name}': value for name, value in state.items()}),
], ids=['mmengine', 'timm', 'plain', 'distributed'])
def test_loads(wrap, state, tmp_path, warnings):
    model = swin()
    meta = load_float_weights(model, saved(wrap(state), tmp_path))
    assert_loaded(model, state)
    assert meta == (dict(epoch=3) if 'meta' in wrap(state) else {})
    assert warnings.text == ''


@pytest.mark.parametrize('meta', [None, [], 'text'])
def test_meta_that_is_no_dict(meta, state, tmp_path):
    assert load_float_weights(swin(), saved(dict(meta=meta, state_dict=state), tmp_path)) == {}


def test_half_precision(state, tmp_path):
    model = swin()
    half = {n: v.half() if v.is_floating_point() else v for n, v in state.items()}
    load_float_weights(model, saved(half, tmp_path))
    assert_loaded(model, {n: v.float() if v.is_floating_point() else v for n, v in half.items()})


def test_model_keeps_its_own_tensors(state, tmp_path):
    """Optimizers and other references stay valid."""
    model = swin()
    model.train()
    before = {name: id(value) for name, value in model.named_parameters()}
    load_float_weights(model, saved(state, tmp_path))
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_extra_keys_only_warn(state, tmp_path, warnings):
    model = swin()
    extra = {f'head.{i}': torch.ones(1) for i in range(5)}
    load_float_weights(model, saved({**state, **extra}, tmp_path))
    assert_loaded(model, state)
    assert 'swin.pth: keys that the model does not have are ignored' in warnings.text
    assert 'head.0, head.1, head.2 and 2 more' in warnings.text


def test_missing_keys(state, tmp_path):
    for name in ('patch_embed.projection.bias', 'stages.1.blocks.1.norm2.weight'):
        del state[name]
    assert_refused(swin(), saved(state, tmp_path),
                   'missing: patch_embed.projection.bias, stages.1.blocks.1.norm2.weight.')


def test_index_tables_may_be_missing(state, tmp_path, warnings):
    tables = [name for name in state if name.endswith('relative_position_index')]
    assert len(tables) == 4
    for name in tables:
        del state[name]
    model = swin()
    load_float_weights(model, saved(state, tmp_path))
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value)
    assert warnings.text == ''


@pytest.mark.parametrize('other, match', [
    (dict(embed_dims=32), r'of another shape: patch_embed.projection.weight \(\(16, 3, 4, 4\) '
                          r'instead of \(32, 3, 4, 4\)\), .* and \d+ more'),
    (dict(depths=(2, 3)), 'missing: stages.1.blocks.2'),
])
def test_other_models(other, match, state, tmp_path):
    assert_refused(swin(**other), saved(state, tmp_path), match)


def test_further_head_only_warns(state, tmp_path, warnings):
    """All that the model needs is there: the rest is of no use to it."""
    model = swin()
    load_float_weights(model, saved({**state, 'head.fc.weight': torch.ones(2, 2)}, tmp_path))
    assert_loaded(model, state)
    assert 'head.fc.weight' in warnings.text


def test_further_blocks_are_of_another_model(state, tmp_path):
    """Every weight of the smaller model is there, and it is another network."""
    assert_refused(swin(depths=(2, 1)), saved(state, tmp_path),
                   'unexpected: stages.1.blocks.1.')


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_not_finite(value, state, tmp_path):
    state['stages.0.blocks.1.ffn.layers.1.weight'][3, 5] = value
    assert_refused(swin(), saved(state, tmp_path),
                   'NaN or infinity in stages.0.blocks.1.ffn.layers.1.weight')


def test_integers_for_weights(state, tmp_path):
    state['patch_embed.projection.weight'] = torch.ones(16, 3, 4, 4, dtype=torch.int8)
    assert_refused(swin(), saved(state, tmp_path),
                   r'of another type: patch_embed.projection.weight \(torch.int8')


def test_quantized_checkpoint(tmp_path):
    model = plain_student(swin(), torch.randn(1, 3, 56, 56))
    path = tmp_path / 'quantized.pth'
    psaq_mm.save(model, path)
    assert_refused(swin(), str(path), 'is quantized already; pass the float checkpoint')
    assert_refused(swin(), saved({MANIFEST_KEY: None}, tmp_path), 'is quantized already')


def test_no_checkpoint(tmp_path):
    assert_refused(swin(), saved(dict(epoch=3), tmp_path), 'holds no weights')
    assert_refused(swin(), saved([1, 2], tmp_path), 'holds no weights')
    assert_refused(swin(), str(tmp_path / 'missing.pth'), 'there is no such file')

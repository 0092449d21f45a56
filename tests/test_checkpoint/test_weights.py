# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which weights of a file are taken: wrapped ones, averaged ones, one of several models."""
import copy
import logging
import pathlib
import sys
import types

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from small_models import swin
from torch import nn

from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import WeightChoice, load_float_weights
from psaq_mm.errors import UserError


class Detector(nn.Module):
    """What the adapters look at of a detector."""

    def __init__(self):
        super().__init__()
        self.backbone = swin()
        self.bbox_head = nn.Linear(2, 2)


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        yield caplog
    logger.removeHandler(caplog.handler)


def state_of(value):
    """Weights that are all one value, but for tables."""
    return {k: torch.full_like(v, value) if v.is_floating_point() else v
            for k, v in Detector().state_dict().items()}


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def loaded(tmp_path, checkpoint, **choice):
    """The value of all weights that were taken."""
    torch.save(checkpoint, tmp_path / 'a.pth')
    model = Detector()
    load_float_weights(model, str(tmp_path / 'a.pth'), choice=WeightChoice(**choice))
    values = {v.flatten()[0].item() for v in model.state_dict().values() if v.is_floating_point()}
    assert len(values) == 1
    return values.pop()


@pytest.mark.parametrize('rename', [
    lambda k: f'_orig_mod.{k}',
    lambda k: f'module._orig_mod.{k}',
    lambda k: f'_orig_mod.module.{k}',
    lambda k: f'module.module.{k}',
    lambda k: k.replace('backbone.', 'backbone._orig_mod.'),
    lambda k: f'model.{k}',
    lambda k: f'_forward_module.model.{k}',
    lambda k: f'net._fsdp_wrapped_module.{k}',
    lambda k: k.replace('.blocks.0.', '.blocks.0._checkpoint_wrapped_module.')])
@pytest.mark.parametrize('place', ['state_dict', 'module', 'model_state_dict', 'top'])
def test_wrapped(tmp_path, rename, place):
    state = {rename(k): v for k, v in state_of(3).items()}
    checkpoint = state if place == 'top' else {place: state, 'epoch': 3}
    assert loaded(tmp_path, checkpoint) == 3


def test_deepspeed(tmp_path, log):
    state = dict(state_of(3), extra_state=None)
    assert loaded(tmp_path, dict(module=state, optimizer=None, global_steps=4, dp_world_size=8,
                                 param_shapes={'bbox_head.weight': torch.Size([2, 2])})) == 3
    assert 'are ignored' not in log.text


SEVERAL = [
    {'state_dict': {**prefixed(state_of(1), 'student.'), **prefixed(state_of(2), 'teacher.')}},
    {'state_dict': {**prefixed(state_of(1), 'module.student._orig_mod.'),
                    **prefixed(state_of(2), 'module.teacher._orig_mod.')}},
    {'student': prefixed(state_of(1), 'module.'), 'teacher': state_of(2)}]


@pytest.mark.parametrize('checkpoint', SEVERAL)
def test_student_and_teacher(tmp_path, checkpoint):
    with pytest.raises(UserError, match='holds 2 models with a Swin: student, teacher. Choose one '
                       'by --prefix, such as --prefix teacher'):
        loaded(tmp_path, checkpoint)
    assert loaded(tmp_path, checkpoint, prefix='student') == 1
    assert loaded(tmp_path, checkpoint, prefix='teacher.') == 2
    with pytest.raises(UserError, match='--prefix pupil: no such weights of the model; found: '):
        loaded(tmp_path, checkpoint, prefix='pupil')


def test_only_one_of_them(tmp_path):
    assert loaded(tmp_path, SEVERAL[0]['state_dict'], prefix='teacher') == 2
    assert loaded(tmp_path, prefixed(state_of(2), 'teacher.')) == 2


def test_model_of_several():
    pair = nn.Module()
    pair.student, pair.teacher = Detector(), Detector()
    with pytest.raises(UserError, match='whose parts student, teacher have a Swin: .*--prefix '
                       'teacher'):
        find_adapter(pair)


AVERAGED = {
    'timm': dict(state_dict=state_of(1), state_dict_ema=state_of(2)),
    'deit': dict(model=state_of(1), model_ema=state_of(2), epoch=3),
    'detr': dict(model=state_of(1), ema=dict(module=state_of(2), updates=9)),
    'params': dict(params=state_of(1), params_ema=state_of(2)),
    'shadow': dict(model=state_of(1), shadow=state_of(2)),
    'one dict': dict(state_dict={**state_of(1), **prefixed(state_of(2), 'ema_model.module.')}),
    'lightning': dict(state_dict={**prefixed(state_of(1), 'model.'),
                                  **prefixed(state_of(2), 'model_ema.')}),
    'torch': dict(model=state_of(1), swa=dict(prefixed(state_of(2), 'module.'),
                                              n_averaged=torch.tensor(3))),
    'mmcv 1': dict(state_dict={**state_of(2), **{
        'ema_' + k.replace('.', '_'): v for k, v in state_of(1).items()}})}


@pytest.mark.parametrize('name', AVERAGED)
def test_averaged_beside_raw(tmp_path, log, name):
    checkpoint = AVERAGED[name]
    assert loaded(tmp_path, checkpoint) == 2
    assert 'a.pth: averaged weights (' in log.text
    assert '--raw takes those' in log.text
    assert loaded(tmp_path, checkpoint, averaged=True) == 2
    assert loaded(tmp_path, checkpoint, averaged=False) == 1
    assert 'a.pth: raw weights (' in log.text


def test_averages_of_parameters_alone(tmp_path):
    raw, averaged = state_of(1), state_of(2)
    averaged = {k: v for k, v in averaged.items() if not k.endswith('index')}
    assert loaded(tmp_path, dict(state_dict=raw, state_dict_ema=averaged)) == 2


def test_hook_of_mmengine(tmp_path):
    """It saves the averaged weights as state_dict, and the raw ones in the average's place."""
    hook, checkpoint = EMAHook(), dict(state_dict=state_of(1))
    hook.ema_model = types.SimpleNamespace(state_dict=lambda: dict(
        prefixed(state_of(2), 'module.'), steps=torch.tensor(5)))
    hook.before_save_checkpoint(None, checkpoint)
    assert loaded(tmp_path, checkpoint) == 2
    assert loaded(tmp_path, checkpoint, averaged=False) == 1


@pytest.mark.parametrize('checkpoint, choice, match', [
    (dict(state_dict=state_of(1)), True, '--ema: no averaged weights .* only state_dict'),
    (dict(model_ema=state_of(1)), False, '--raw: only averaged weights .*: model_ema')])
def test_what_is_not_there(tmp_path, checkpoint, choice, match):
    with pytest.raises(UserError, match=match):
        loaded(tmp_path, checkpoint, averaged=choice)


@pytest.mark.parametrize('change', [
    lambda index: (index * 0.9999).long(),  # an average of integers, truncated
    lambda index: index.t().contiguous(),
    lambda index: index + 10**6,
    lambda index: torch.zeros_like(index),
    lambda index: index.float() + 0.4])
def test_tables_that_the_model_computes(tmp_path, log, change):
    source = Detector()
    state = {k: change(v) if k.endswith('relative_position_index') else v
             for k, v in source.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    model = Detector()
    load_float_weights(model, str(tmp_path / 'a.pth'))
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert '4 tables that the model computes itself have other values' in log.text


def test_tables_in_other_types(tmp_path, log):
    state = {k: v.int() if k.endswith('index') else v for k, v in Detector().state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    load_float_weights(Detector(), str(tmp_path / 'a.pth'))
    assert 'computes itself' not in log.text


def test_objects_of_other_packages_are_skipped(tmp_path, monkeypatch):
    """A scheduler of anyone's among what the optimizer holds, and what is in arguments."""
    with monkeypatch.context() as patch:
        package = types.ModuleType('somebodys')
        patch.setitem(sys.modules, 'somebodys', package)

        class Scheduler:

            def __init__(self):
                self.steps, self.bound = [1, 2], self.step

            def step(self):
                raise AssertionError('run')

        Scheduler.__module__, Scheduler.__qualname__ = 'somebodys', 'Scheduler'
        package.Scheduler = Scheduler
        torch.save(dict(
            state_dict=state_of(4), args=dict(out=pathlib.PurePosixPath('a/b')),
            optimizer=dict(state={0: dict(exp_avg=torch.ones(2))}, scheduler=Scheduler(),
                           param_groups=[dict(lr=Scheduler())])), tmp_path / 'a.pth')
    model = Detector()
    load_float_weights(model, str(tmp_path / 'a.pth'))
    assert model.bbox_head.weight.flatten()[0] == 4
    assert copy.deepcopy(model) is not model

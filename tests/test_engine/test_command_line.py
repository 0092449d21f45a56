# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the tools' shell makes of arguments, config and environment."""
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.visualization import LocalVisBackend

from psaq_mm.engine import load_config, read_recipe
from psaq_mm.engine.command_line import (
    choose_seed,
    hooks_for_test,
    keep_local,
    prepare_for_test,
    require_launcher,
    require_test_data,
    run_tool,
)
from psaq_mm.errors import UserError
from psaq_mm.recipe import Recipe


@pytest.mark.parametrize('given, config, expected', [
    (None, dict(), 0), (None, dict(randomness=None), 0), (None, dict(randomness=dict(seed=5)), 5),
    (None, dict(randomness=dict(seed=None)), 0), (3, dict(randomness=dict(seed=5)), 3),
    (0, dict(randomness=dict(seed=5)), 0), (2**32 - 1, dict(), 2**32 - 1)])
def test_seed(given, config, expected):
    assert choose_seed(given, Config(config)) == expected


@pytest.mark.parametrize('given, seed, name', [(-1, None, '--seed'), (2**32, 5, '--seed'),
                                               (None, 1.5, 'randomness.seed'),
                                               (None, 'x', 'randomness.seed'),
                                               (None, True, 'randomness.seed')])
def test_what_is_no_seed(given, seed, name):
    with pytest.raises(UserError, match=f'^{name} must be an integer from 0'):
        choose_seed(given, Config(dict(randomness=dict(seed=seed))))


@pytest.mark.parametrize('rank, fits', [(0, True), (1, True), (2, False)])
def test_a_gpu_for_each_process(rank, fits, monkeypatch):
    """Of a machine with two."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for name, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    if fits:
        require_launcher('pytorch', 'auto')
        return
    with pytest.raises(UserError, match='more processes than the 2 GPUs here'):
        require_launcher('pytorch', 'auto')


@pytest.mark.parametrize('error, status', [
    (None, 0), (UserError('no such file'), 2), (FloatingPointError('a loss is nan'), 1)])
def test_the_group_is_taken_down(error, status, tmp_path, capsys):
    """Else a thread of it may abort the process, and with it the status."""
    def work():
        dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meeting', rank=0,
                                world_size=1)
        dist.all_reduce(torch.ones(2))
        if error is not None:
            raise error

    found = 0
    try:
        run_tool(work)
    except SystemExit as end:
        found = end.code
    assert found == status and not dist.is_initialized()
    assert capsys.readouterr().err == ('' if error is None else f'error: {error}\n')
    run_tool(lambda: None)  # one process, and no group


class AtTheEnd(Hook):

    def after_run(self, runner):
        pass


class AfterEachIteration(Hook):

    def after_train_iter(self, *args, **kwargs):
        pass

    def _after_iter(self, *args, **kwargs):
        pass


@pytest.mark.parametrize('hook, kept', [
    (dict(type='EMAHook'), False), (EMAHook(), False),  # would swap weights before a test
    (dict(type='mmdet.PipelineSwitchHook', switch_epoch=1, switch_pipeline=[]), False),
    (dict(type='SetEpochInfoHook'), False),  # a hook of mmdet, by a name without scope
    (dict(type='EarlyStoppingHook', monitor='mAP'), False),
    (dict(type='mmdet.DetVisualizationHook'), True), (dict(type='EmptyCacheHook'), True),
    (dict(type='NoSuchHook'), True),  # mmengine says so
    (dict(type=AtTheEnd), True), (AfterEachIteration(), True)])
def test_hooks_of_training_are_dropped(hook, kept):
    config = Config(dict(default_scope='mmdet', custom_hooks=[]))
    alone = hooks_for_test(config, 'a.pth', 'torch', None, 0, 'fp32')
    assert [entry['type'] for entry in alone] == ['psaq_mm.QuantizedCheckpointHook']
    config.custom_hooks = [hook]
    assert hooks_for_test(config, 'a.pth', 'torch', None, 0, 'fp32') == [hook] * kept + alone


def test_what_a_test_does_without():
    config = Config(dict(
        resume=True, train_cfg=dict(), train_dataloader=dict(), optim_wrapper=dict(),
        param_scheduler=[], default_hooks=dict(
            ema=dict(type='EMAHook'), timer=dict(type='IterTimerHook'), logger=None)))
    prepare_for_test(config)
    assert config.to_dict() == dict(resume=False, default_hooks=dict(
        ema=None, timer=dict(type='IterTimerHook'), logger=None))


@pytest.mark.parametrize('given, kept', [
    ([dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')],
     [dict(type='LocalVisBackend')]),
    ([dict(type='mmengine.WandbVisBackend'), dict(type='ClearMLVisBackend')], []),
    (dict(type='MLflowVisBackend'), []),
    ([dict(type=LocalVisBackend)], [dict(type=LocalVisBackend)]),
    ([], []), (None, None)])
def test_only_local_backends(given, kept, capsys):
    config = Config(dict(visualizer=dict(type='Visualizer', vis_backends=given)))
    keep_local(config)
    assert config.visualizer.vis_backends == kept
    printed = capsys.readouterr().out
    names = [entry['type'] for entry in ([given] if isinstance(given, dict) else given or [])
             if entry not in (kept or [])]
    assert all(name in printed for name in names) and bool(printed) == bool(names)
    keep_local(Config(dict()))


def test_shipped_config_by_name():
    name = 'mask_rcnn_swin_t_w8a8.py'
    found, expected = load_config(f'psaq_mm::{name}'), load_config(ROOT / 'configs' / name)
    assert found.to_dict() == expected.to_dict()
    assert load_config('mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py').model.type == 'RTMDet'


@pytest.mark.parametrize('name, message', [
    ('psaq_mm::nowhere.py', 'nowhere.py does not exist'),
    ('no_such_package::x.py', "no package 'no_such_package' is installed"),
    ('a/b::x.py', "no package 'a/b' is installed"), ('sys::x.py', "no package 'sys'")])
def test_no_such_shipped_config(name, message):
    with pytest.raises(UserError, match=message):
        load_config(name)


def test_two_bases_with_hooks(tmp_path):
    """mmengine refuses them; the message says what to write, and that works."""
    rtmdet = "'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py'"
    (tmp_path / 'two.py').write_text(f"_base_ = [{rtmdet}, '{ROOT}/configs/_base_/w8a8.py']\n")
    with pytest.raises(UserError, match='Duplicate keys: .*custom_hooks') as error:
        load_config(tmp_path / 'two.py')
    assert "write recipe = 'w8a8' " in str(error.value)
    (tmp_path / 'one.py').write_text(f"_base_ = {rtmdet}\nrecipe = 'w8a8'\n")
    assert read_recipe(load_config(tmp_path / 'one.py')) == Recipe.shipped('w8a8')


def data_set(folder, name, **changes):
    """A section with files that are there."""
    (folder / name).mkdir(exist_ok=True)
    (folder / f'{name}.json').write_text('{}')
    return dict(type='CocoDataset', data_root=str(folder), ann_file=f'{name}.json',
                data_prefix=dict(img=name), **changes)


def config_of(dataset, evaluator):
    return Config(dict(test_dataloader=dict(dataset=dataset), test_evaluator=evaluator))


@pytest.mark.parametrize('wrap', [
    lambda one, other: dict(type='ConcatDataset', datasets=[one, other]),
    lambda one, other: dict(type='RepeatDataset', dataset=dict(
        type='ConcatDataset', datasets=[dict(type='RepeatDataset', dataset=one), other])),
    lambda one, other: other])
def test_every_data_set_must_be_there(tmp_path, wrap):
    evaluator = dict(type='CocoMetric', ann_file=str(tmp_path / 'a.json'))
    one, other = data_set(tmp_path, 'a'), data_set(tmp_path, 'b')
    require_test_data(config_of(wrap(one, other), evaluator))
    for key, missing in (('ann_file', 'c.json'), ('data_prefix', dict(img='c')),
                         ('label_map_file', 'labels.json')):
        with pytest.raises(UserError, match=rf'/(c|c.json|labels.json) does not exist \({key}\)'):
            require_test_data(config_of(wrap(one, dict(other, **{key: missing})), evaluator))


@pytest.mark.parametrize('wrap', [
    lambda one, other: [one, other],
    lambda one, other: dict(type='MultiDatasetsEvaluator', metrics=[one, other]),
    lambda one, other: [dict(type='Evaluator', metrics=other), one]])
def test_every_evaluator_must_find_its_files(tmp_path, wrap):
    dataset = data_set(tmp_path, 'a')
    one = dict(type='CocoMetric', ann_file=str(tmp_path / 'a.json'),
               outfile_prefix=str(tmp_path / 'written/later'))
    require_test_data(config_of(dataset, wrap(one, one)))
    for key in ('ann_file', 'seg_prefix'):
        other = dict(type='CocoPanopticMetric', **{key: str(tmp_path / 'missing')})
        with pytest.raises(UserError, match=rf'test_evaluator.{key}: .*/missing does not exist'):
            require_test_data(config_of(dataset, wrap(one, other)))
        other['backend_args'] = dict(backend='petrel')
        require_test_data(config_of(dataset, wrap(one, other)))

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""tools/quantize.py: what it writes, that it resumes, and how it fails."""
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from mmengine.config import DictAction
from own_process import of_two, run_scripts
from PIL import Image
from small_models import SMALL, left_as_it_was

import psaq_mm
from psaq_mm.checkpoint import STATE_KEY, load_checkpoint_file, load_float_weights
from psaq_mm.engine import build_float_model, load_config, read_recipe

FEW = ('synthesis.num_images=3', 'synthesis.batch_size=2', 'synthesis.steps=2',
       'synthesis.image_size=64', 'synthesis.save_interval=1', 'log_level=WARNING',
       'evolution.rounds=2', 'evolution.sample_steps=1', 'evolution.student_steps=2',
       'evolution.batch_size=2', 'evolution.save_interval=1',
       'quantization.weight.rounding=nearest')  # else a phase more if no round helps
SYNTHESIS_STEPS, EVOLUTION_STEPS = 2 * 2 * 2, 2 * (1 + 2)  # batches, phases, steps; rounds


@pytest.fixture(scope='module')
def finished_run(tmp_path_factory, small_config, small_checkpoint):
    """A work directory after one run in a process of its own."""
    work_dir = tmp_path_factory.mktemp('run')
    process = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'quantize.py'), str(small_config),
         str(small_checkpoint), '--work-dir', str(work_dir), '--seed', '7', '--device', 'cpu',
         '--cfg-options', *FEW], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return work_dir, process


def test_writes_checkpoint_pictures_and_report(finished_run):
    work_dir, process = finished_run
    checkpoint = load_checkpoint_file(work_dir / 'quantized.pth')
    assert checkpoint['psaq_mm']['seed'] == 7
    assert checkpoint['meta']['dataset_meta']['classes'][0] == 'disc'
    # 3 images of 64 with 4 columns: one row, 4 pixels of padding around each
    assert Image.open(work_dir / 'synthetic.png').size == (3 * 68 + 4, 72)
    # 2 of the 3 images of the start evolve: rows of 3 would not be full
    assert Image.open(work_dir / 'evolution.png').size == (4 * 68 + 4, 2 * 68 + 4)
    assert 'synthesis' in process.stderr and 'total=' in process.stderr  # bars with losses
    assert 'evolution' in process.stderr and 'discrepancy=' in process.stderr
    assert 'adversarial_factor=' in process.stderr and 'round=' in process.stderr


def test_report_says_what_was_done(finished_run, small_checkpoint):
    report = json.loads((finished_run[0] / 'report.json').read_text())
    assert all(0 < entry['sensitivity'] < 0.2 for entry in report['modules'])
    assert {'synthesis', 'calibration', 'evolution', 'report'} <= set(report['memory'])
    assert all(peaks['process'] > 1e8 for peaks in report['memory'].values())
    assert report['command'].startswith(f'python {ROOT / "tools" / "quantize.py"} ')
    assert report['file_bytes']['float'] == small_checkpoint.stat().st_size
    page = (finished_run[0] / 'report.html').read_text()
    assert page.count('data:image/jpeg') == 3 and page.count('<svg') == 5
    assert 'a row after each of the steps 1, 2, 4.' in page and 'How they evolved' in page
    assert len(page) < 1_000_000
    shown = sorted(path.name for path in finished_run[0].glob('*/vis_data/vis_image/*'))
    assert shown == [*(f'evolution_{i}.png' for i in (3, 6)),
                     *(f'synthesis_{i}.png' for i in (1, 2, 4, 8))]
    modules = {entry['name']: entry for entry in report['modules']}
    patch = modules['backbone.patch_embed.projection']
    assert patch['tensors']['weight'] == dict(patch['tensors']['weight'], bits=8, ranges=16)
    # Room in the ranges costs decibels, most where 4 tokens attend within windows of 49.
    ratios = [entry['sqnr_db'] for name, entry in modules.items() if name.startswith('backbone.')]
    assert min(ratios) > 10 and statistics.median(ratios) > 25
    assert len(report['losses']['total']) == SYNTHESIS_STEPS
    assert set(report['seconds']) == {'synthesis', 'calibration', 'evolution', 'final_ranges',
                                      'report'}
    assert len(report['losses']['student/discrepancy']) == 2 * 2
    assert len(report['losses']['sample/total']) == 2
    assert len(report['losses']['round/discrepancy']) == 3  # as calibrated, and 2 rounds
    assert report['seed'] == 7 and report['checkpoint']['file'] == str(small_checkpoint)
    assert len(report['checkpoint']['sha256']) == 64
    assert report['versions']['torch'] == torch.__version__
    assert report['size']['stored_bytes'] <= 0.265 * report['size']['float_bytes']


def test_same_seed_gives_the_same_bits(finished_run, tmp_path, call_tool, small_config,
                                       small_checkpoint):
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               tmp_path, '--seed', 7, '--device', 'cpu', '--cfg-options', *FEW)
    assert status == 0, err
    assert_same_checkpoint(finished_run[0] / 'quantized.pth', tmp_path / 'quantized.pth')


def test_one_call_gives_the_same_bits(finished_run, tmp_path, small_config,
                                      small_checkpoint):
    """From Python, without any file, what the tool does: and the caller's model stays."""
    config = load_config(small_config, options_of(FEW))
    model = build_float_model(config)
    load_float_weights(model, str(small_checkpoint))
    model.cfg = config
    model.train()
    with left_as_it_was(model):
        student = psaq_mm.quantize(model, read_recipe(config), seed=7)
    psaq_mm.save(student, tmp_path / 'quantized.pth')
    first, second = (load_checkpoint_file(folder / 'quantized.pth')
                     for folder in (finished_run[0], tmp_path))
    assert_same_state(first, second)
    assert first['psaq_mm']['modules'] == second['psaq_mm']['modules']


@pytest.mark.parametrize('options, message', [
    (('--show', 'nowhere.png'), 'nowhere.png'), (('--show', 'many'), '17 images are too many'),
    (('--show', 'file.png'), 'cannot be read'),
    (('--sensitivity-images', -1), '--sensitivity-images must be 0 or more, got -1')])
def test_bad_report_options(options, message, tmp_path, call_tool, monkeypatch,
                            small_config, small_checkpoint):
    (tmp_path / 'many').mkdir()
    for i in range(17):
        Image.new('RGB', (2, 2)).save(tmp_path / 'many' / f'{i}.png')
    (tmp_path / 'file.png').write_text('')
    monkeypatch.chdir(tmp_path)
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               'out', *options)
    assert status == 2 and err.startswith('error: ') and message in err
    assert not (tmp_path / 'out').exists()


def test_dumped_config_gives_the_same_bits(finished_run, tmp_path, call_tool,
                                           small_config, small_checkpoint):
    """It says all that a run does, options too."""
    dumped = finished_run[0] / small_config.name
    status, _, err = call_tool('quantize', dumped, small_checkpoint, '--work-dir', tmp_path,
                               '--seed', 7, '--device', 'cpu')
    assert status == 0, err
    assert_same_checkpoint(finished_run[0] / 'quantized.pth', tmp_path / 'quantized.pth')
    first, second = (json.loads((folder / 'report.json').read_text())
                     for folder in (finished_run[0], tmp_path))
    assert first['settings'] == second['settings']


def test_preset_on_a_dumped_config(finished_run, tmp_path, call_tool, small_config,
                                   small_checkpoint):
    """What the config itself sets stays; what it does not is the preset's."""
    status, _, err = call_tool(
        'quantize', finished_run[0] / small_config.name, small_checkpoint, '--work-dir',
        tmp_path, '--seed', 7, '--device', 'cpu', '--cfg-options', 'preset=paper',
        'evolution.rounds=0', 'synthesis.num_images=2')
    assert status == 0, err
    settings = json.loads((tmp_path / 'report.json').read_text())['settings']
    assert settings['quantization']['placement'] == 'v1'
    assert settings['synthesis']['priors']['patch_similarity']['form'] == 'v1'
    assert settings['synthesis']['steps'] == 2  # of the config, not the preset's 500


def options_of(pairs):
    """What ``--cfg-options`` makes of KEY=VALUE pairs."""
    return {key: DictAction._parse_iterable(value) for key, value in
            (pair.split('=', 1) for pair in pairs)}


def assert_same_state(a, b):
    assert list(a[STATE_KEY]) == list(b[STATE_KEY])
    for key, value in a[STATE_KEY].items():
        assert torch.equal(value, b[STATE_KEY][key]), key


def assert_same_checkpoint(first, second):
    a, b = (load_checkpoint_file(p) for p in (first, second))
    assert_same_state(a, b)
    assert a['psaq_mm'] == b['psaq_mm']


@pytest.mark.parametrize('stop_at', [1, 4, 5])
def test_resume_gives_the_same_bits(stop_at, finished_run, tmp_path, call_tool, monkeypatch,
                                    small_config, small_checkpoint):
    """Interrupted in the first batch, at its end, and in the second."""
    from psaq_mm.synthesis import Synthesizer
    step = Synthesizer.step

    def interrupted(self):
        if self.step_index == stop_at:
            raise KeyboardInterrupt
        return step(self)

    arguments = (small_config, small_checkpoint, '--work-dir', tmp_path, '--seed', 7,
                 '--device', 'cpu', '--cfg-options', *FEW)
    monkeypatch.setattr(Synthesizer, 'step', interrupted)
    status, _, _ = call_tool('quantize', *arguments, page=stop_at == 4)
    assert status == 130 and not (tmp_path / 'quantized.pth').exists()
    monkeypatch.setattr(Synthesizer, 'step', step)
    status, _, err = call_tool('quantize', *arguments, '--resume', page=stop_at == 4)
    assert status == 0, err
    assert_same_checkpoint(finished_run[0] / 'quantized.pth', tmp_path / 'quantized.pth')
    if stop_at == 4:  # with the pictures from before the stop
        pages = [(folder / 'report.html').read_text() for folder in (finished_run[0], tmp_path)]
        pictures = [re.findall('data:image/jpeg[^"]+', page) for page in pages]
        assert len(pictures[0]) == 3 and pictures[0] == pictures[1]


@pytest.mark.parametrize('stop_at, how', [
    (0, 'between'), (1, 'between'), (3, 'between'), (5, 'between'),
    (0, 'within'), (3, 'within'), (5, 'within')])
def test_resumed_evolution_gives_the_same_bits(stop_at, how, finished_run, tmp_path, call_tool,
                                               monkeypatch, small_config,
                                               small_checkpoint):
    """Interrupted before a step of either kind, or while it changes the student."""
    from psaq_mm.evolution import Evolver
    step = Evolver.step

    def interrupted(self):
        if self.step_index == stop_at:
            if how == 'within':
                self._change()
            raise KeyboardInterrupt
        return step(self)

    arguments = (small_config, small_checkpoint, '--work-dir', tmp_path, '--seed', 7,
                 '--device', 'cpu', '--cfg-options', *FEW)
    monkeypatch.setattr(Evolver, 'step', interrupted)
    status, _, _ = call_tool('quantize', *arguments)
    assert status == 130 and not (tmp_path / 'quantized.pth').exists()
    monkeypatch.setattr(Evolver, 'step', step)
    status, _, err = call_tool('quantize', *arguments, '--resume')
    assert status == 0, err
    assert_same_checkpoint(finished_run[0] / 'quantized.pth', tmp_path / 'quantized.pth')
    report = json.loads((tmp_path / 'report.json').read_text())
    first = json.loads((finished_run[0] / 'report.json').read_text())
    assert report['losses'] == first['losses']
    assert set(report['memory']) == set(first['memory'])
    picture, expected = (Image.open(path / 'evolution.png')
                         for path in (tmp_path, finished_run[0]))
    assert picture.tobytes() == expected.tobytes()  # rounds from before the stop too


def test_loss_that_is_not_finite(tmp_path, call_tool, monkeypatch, small_config,
                                 small_checkpoint, finished_run):
    """One line, status 1, and the last good state on disk: a resumed run that
    meets no such loss ends with the same bits."""
    from psaq_mm.evolution import StudentLearner
    discrepancy = StudentLearner.discrepancy
    calls = []

    def broken(self, teacher, images):
        calls.append(1)
        value = discrepancy(self, teacher, images)
        # 2 batches are measured before the first step
        return value * float('nan') if len(calls) == 5 else value

    monkeypatch.setattr(StudentLearner, 'discrepancy', broken)
    arguments = (small_config, small_checkpoint, '--work-dir', tmp_path, '--seed', 7,
                 '--device', 'cpu', '--cfg-options', *FEW, 'evolution.save_interval=1000')
    status, _, err = call_tool('quantize', *arguments)
    assert status == 1
    assert 'evolution, step 2 (round 1): the discrepancy is nan' in err
    assert not (tmp_path / 'quantized.pth').exists()
    monkeypatch.setattr(StudentLearner, 'discrepancy', discrepancy)
    status, _, err = call_tool('quantize', *arguments, '--resume')
    assert status == 0, err
    a, b = (load_checkpoint_file(p / 'quantized.pth')[STATE_KEY]
            for p in (finished_run[0], tmp_path))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('option, name', [('evolution.range_lr=0.5', 'evolution'),
                                          ('quantization.weight.bits=4', 'quantization')])
def test_images_serve_another_game(option, name, tmp_path, call_tool, small_config,
                                   small_checkpoint, finished_run):
    """Where only what comes after them is changed, the images of a run are used, it says so,
    and all is as if it had been so from the start."""
    (tmp_path / 'resumed').mkdir()
    shutil.copy(finished_run[0] / 'state.pth', tmp_path / 'resumed' / 'state.pth')
    for folder, resume in (('fresh', ()), ('resumed', ('--resume', ))):
        status, _, err = call_tool('quantize', small_config, small_checkpoint,
                                   '--work-dir', tmp_path / folder, '--seed', 7, *resume,
                                   '--device', 'cpu', '--cfg-options', *FEW, option)
        assert status == 0, err
    assert_same_checkpoint(tmp_path / 'fresh' / 'quantized.pth',
                           tmp_path / 'resumed' / 'quantized.pth')
    log, = (tmp_path / 'resumed').glob('*/*.log')
    assert f'another {name}: its images are used, the evolution starts again' in log.read_text()
    reports = [json.loads((tmp_path / folder / 'report.json').read_text())
               for folder in ('fresh', 'resumed')]
    assert reports[0]['losses'] == reports[1]['losses']


def test_game_serves_another_rounding(tmp_path, call_tool, small_config, small_checkpoint,
                                      finished_run):
    """Weights are rounded last: nothing that was saved depends on it."""
    shutil.copy(finished_run[0] / 'state.pth', tmp_path / 'state.pth')
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               tmp_path, '--seed', 7, '--device', 'cpu', '--resume',
                               '--cfg-options', *FEW, 'quantization.weight.rounding=gptq')
    assert status == 0, err
    log, = tmp_path.glob('*/*.log')
    assert 'the evolution starts again' not in log.read_text()
    reports = [json.loads((folder / 'report.json').read_text())
               for folder in (finished_run[0], tmp_path)]
    assert reports[0]['losses'] == reports[1]['losses']


TWICE = """
import os, runpy, shutil, sys
from psaq_mm.engine.command_line import run_tool
tool, given = runpy.run_path({tool!r}), sys.argv[1:]
state = ('state.pth', 'state_1.pth')[int(os.environ['RANK'])]

def main():
    sys.argv = ['quantize.py', '--work-dir', 'first', *given]
    tool['main']()
    os.makedirs('second', exist_ok=True)
    shutil.copy(os.path.join('first', state), os.path.join('second', state))
    sys.argv = ['quantize.py', '--work-dir', 'second', '--resume', *given]
    tool['main']()

run_tool(main)
"""


def test_two_processes(finished_run, tmp_path, small_config, small_checkpoint):
    """They share images and batches, what RoI heads are rounded by too, and their files
    resume: the same bits. The images are those of one process."""
    script = tmp_path / 'twice.py'
    script.write_text(TWICE.format(tool=str(ROOT / 'tools' / 'quantize.py')))
    processes = run_scripts(
        tmp_path, script, small_config, small_checkpoint, '--seed', '7', '--launcher', 'pytorch',
        '--sensitivity-images', '0', '--cfg-options', *FEW, 'quantization.scope=model',
        'quantization.weight.rounding=gptq', environments=of_two())
    for process in processes:
        assert process.returncode == 0, process.stdout[-3000:]
    for folder in ('first', 'second'):
        report = json.loads((tmp_path / folder / 'report.json').read_text())
        assert 'rounding' in report['seconds']
    states = [load_checkpoint_file(tmp_path / 'first' / name)
              for name in ('state.pth', 'state_1.pth')]
    alone = load_checkpoint_file(finished_run[0] / 'state.pth')
    images = [torch.cat([*state['images']['finished']]) for state in (*states, alone)]
    assert [len(part) for part in images] == [2, 1, 3]
    torch.testing.assert_close(torch.cat(images[:2]), images[2], rtol=1e-4, atol=1e-5)
    for rank, state in enumerate(states):
        assert state['game']['step_index'] == EVOLUTION_STEPS
        # pictures are the first process's
        assert len(state['extra']['ContactSheetHook'][0]['rows']) == (1 if rank else 3)
    assert_same_checkpoint(tmp_path / 'first' / 'quantized.pth',
                           tmp_path / 'second' / 'quantized.pth')


@pytest.mark.parametrize('rank, obstacle', [(0, 'quantized.pth'), (1, 'state_1.pth')])
def test_error_in_one_process_ends_both(rank, obstacle, tmp_path, small_config,
                                        small_checkpoint):
    """A file that cannot be written, on the way or at the end: one line of each, and nobody
    waits for a process that has gone."""
    (tmp_path / obstacle).mkdir()  # a folder of that name
    processes = run_scripts(
        tmp_path, ROOT / 'tools' / 'quantize.py', small_config, small_checkpoint, '--work-dir',
        tmp_path, '--launcher', 'pytorch', '--cfg-options', *FEW, 'evolution.rounds=0',
        'synthesis.num_images=2', 'log_level=ERROR', environments=of_two())
    errors = [process.stdout for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    lines = [[line for line in error.splitlines() if line.startswith('error: ')]
             for error in errors]
    assert [len(found) for found in lines] == [1, 1] and 'Traceback' not in ''.join(errors)
    assert obstacle in lines[rank][0]
    assert lines[1 - rank] == ['error: another process stopped; its message says why']


def test_student_that_learns_nothing_stays_as_calibrated(tmp_path, call_tool, small_checkpoint,
                                                         small_config):
    """Rates that ruin it are said to do so, and ruin nothing that is written.

    Rounded to nearest: GPTQ turns a last bit of a range into other integers.
    """
    options = {'learns': ('evolution.weight_lr=1', 'evolution.range_lr=1'),
               'calibrated': ('evolution.rounds=0', )}
    for folder, changed in options.items():
        status, _, err = call_tool('quantize', small_config, small_checkpoint,
                                   '--work-dir', tmp_path / folder, '--device', 'cpu',
                                   '--cfg-options', *FEW, 'evolution.sample_steps=0',
                                   *changed)
        assert status == 0, err
    log, = (tmp_path / 'learns').glob('*/*.log')
    assert 'it stays as calibrated; lower evolution.weight_lr or range_lr' in log.read_text()
    a, b = (load_checkpoint_file(tmp_path / folder / 'quantized.pth')[STATE_KEY]
            for folder in options)
    for key, value in a.items():  # learned ranges are transferred to the test size, as they were
        torch.testing.assert_close(value, b[key], rtol=1e-5, atol=1e-7)


def test_images_of_another_model_are_not_resumed(tmp_path, call_tool, small_config,
                                                 small_checkpoint, finished_run):
    """Other means of pixels, other images."""
    shutil.copy(finished_run[0] / 'state.pth', tmp_path / 'state.pth')
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               tmp_path, '--seed', 7, '--resume', '--cfg-options', *FEW,
                               'model.data_preprocessor.mean=[0.,0.,0.]')
    assert status == 2 and 'another model' in err


@pytest.mark.parametrize('how', ['between', 'within'])
def test_what_hooks_keep_is_resumed(how, tmp_path, call_tool, monkeypatch, small_config,
                                    small_checkpoint):
    """Each hook of a class has heard of each step once, wherever the run was stopped."""
    from psaq_mm.engine import PSAQHook
    from psaq_mm.evolution import Evolver
    from psaq_mm.registry import HOOKS
    hooks = []

    class ListeningHook(PSAQHook):
        def __init__(self, sign):
            self.heard, self.sign = [], sign
            hooks.append(self)

        def after_evolution_step(self, runner, evolver, losses):
            self.heard.append(self.sign * evolver.step_index)

        def state_dict(self):
            return dict(heard=list(self.heard))

        def load_state_dict(self, state):
            self.heard = state['heard']

    config = tmp_path / 'listening.py'
    config.write_text(f"_base_ = '{small_config}'\ncustom_hooks = [dict(type="
                      "'ListeningHook', sign=1), dict(type='ListeningHook', sign=-1)]\n")
    step = Evolver.step

    def interrupted(self):
        if self.step_index == 4:
            if how == 'within':
                self._change()
            raise KeyboardInterrupt
        return step(self)

    arguments = (config, small_checkpoint, '--work-dir', tmp_path / 'out', '--device', 'cpu',
                 '--cfg-options', *FEW)
    HOOKS.register_module(module=ListeningHook)
    try:
        monkeypatch.setattr(Evolver, 'step', interrupted)
        assert call_tool('quantize', *arguments)[0] == 130
        monkeypatch.setattr(Evolver, 'step', step)
        status, _, err = call_tool('quantize', *arguments, '--resume')
        assert status == 0, err
    finally:
        HOOKS.module_dict.pop('ListeningHook')
    expected = list(range(1, EVOLUTION_STEPS + 1))
    assert [hook.heard for hook in hooks[2:]] == [expected, [-step for step in expected]]


def test_resume_refuses_the_state_of_another_run(finished_run, tmp_path, call_tool,
                                                 small_config, small_checkpoint):
    shutil.copy(finished_run[0] / 'state.pth', tmp_path / 'state.pth')
    before = (tmp_path / 'state.pth').read_bytes()
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               tmp_path, '--seed', 8, '--cfg-options', *FEW, '--resume')
    assert status == 2 and 'another seed' in err
    assert (tmp_path / 'state.pth').read_bytes() == before


def test_opens_no_dataset(tmp_path, call_tool, small_config, small_checkpoint):
    """A config whose data is on another machine quantizes all the same."""
    config = tmp_path / 'elsewhere.py'
    config.write_text(f"_base_ = '{small_config}'\n"
                      + ''.join(f"{split}_dataloader = dict(dataset=dict("
                                "data_root='/nowhere/', ann_file='/nowhere/none.json'))\n"
                                for split in ('train', 'val', 'test'))
                      + "val_evaluator = dict(ann_file='/nowhere/none.json')\n"
                      + "test_evaluator = dict(ann_file='/nowhere/none.json')\n")
    status, _, err = call_tool('quantize', config, small_checkpoint, '--work-dir',
                               tmp_path / 'out', '--cfg-options', *FEW)
    assert status == 0, err
    assert (tmp_path / 'out' / 'quantized.pth').exists()


def test_whole_model_scope(tmp_path, call_tool, small_config, small_checkpoint):
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               tmp_path, '--cfg-options', *FEW, 'quantization.scope=model')
    assert status == 0, err
    modules = load_checkpoint_file(tmp_path / 'quantized.pth')['psaq_mm']['modules']
    for name in ('neck.lateral_convs.0.conv', 'rpn_head.rpn_cls',
                 'roi_head.bbox_head.shared_fcs.0', 'roi_head.mask_head.conv_logits'):
        assert name in modules


def test_paper_preset(tmp_path, call_tool, demo_config, small_checkpoint):
    config = tmp_path / 'paper.py'
    config.write_text(f"_base_ = ['{demo_config}', 'psaq_mm::_base_/w8a8.py']\n"
                      f"preset = 'paper'\nmodel = {SMALL!r}\n")
    status, _, err = call_tool('quantize', config, small_checkpoint, '--work-dir', tmp_path,
                               '--cfg-options', *FEW)
    assert status == 0, err
    modules = load_checkpoint_file(tmp_path / 'quantized.pth')['psaq_mm']['modules']
    assert set(modules['backbone.stages.0.blocks.0']['roles']) == {
        'attention_residual', 'ffn_residual'}
    assert set(modules['backbone.stages.0.blocks.0.attn.w_msa']['roles']) == {'logits',
                                                                             'bias_table'}
    assert set(modules['backbone.stages.0.blocks.0.attn.w_msa.qkv']['roles']) == {
        'weight', 'input', 'output'}


class _Attack:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker), )


def _bad_checkpoint(kind, tmp_path, small_checkpoint):
    path = tmp_path / f'{kind}.pth'
    if kind == 'text':
        path.write_text('not a checkpoint')
    elif kind == 'attack':
        path.write_bytes(pickle.dumps(_Attack(tmp_path / 'attacked')))
    elif kind == 'attack_zip':
        torch.save(dict(state_dict=_Attack(tmp_path / 'attacked')), path)
    elif kind == 'other_model':
        torch.save(dict(state_dict={'conv1.weight': torch.zeros(64, 3, 7, 7)}), path)
    elif kind == 'not_finite':
        checkpoint = torch.load(small_checkpoint, weights_only=True)
        checkpoint['state_dict']['neck.fpn_convs.0.conv.bias'][3] = float('nan')
        torch.save(checkpoint, path)
    elif kind == 'quantized':
        torch.save(dict(state_dict={}, psaq_mm=dict(format_version=1)), path)
    return path  # 'missing' is not written


@pytest.mark.parametrize('kind, message', [
    ('missing', 'missing.pth'),
    ('text', 'text.pth'),
    ('attack', 'mkdir'),
    ('attack_zip', 'mkdir'),
    ('other_model', 'backbone.patch_embed.projection.weight'),
    ('not_finite', 'neck.fpn_convs.0.conv.bias'),
    ('quantized', 'quantized already'),
])
def test_bad_checkpoints(kind, message, tmp_path, call_tool, small_config,
                         small_checkpoint):
    path = _bad_checkpoint(kind, tmp_path, small_checkpoint)
    work_dir = tmp_path / 'out'
    status, out, err = call_tool('quantize', small_config, path, '--work-dir', work_dir)
    assert status == 2 and err.startswith('error: ') and message in err
    assert len(err.strip().splitlines()) <= 2 and 'Traceback' not in err
    assert not work_dir.exists() and not (tmp_path / 'attacked').exists()


@pytest.mark.parametrize('option, message', [
    ('quantization.weight.bits=9', 'quantization.weight.bits must be an integer from 2 to 8'),
    ('quantization.activation.bits=1', 'bits must be an integer from 2 to 8'),
    ('quantization.weight.bitz=4', "Did you mean 'bits'?"),
    ('quantization.includ=*', "Did you mean 'include'?"),
    ('quantisation.weight.bits=4', "Did you mean 'quantization'?"),
    ('synthesis.stepz=4', "Did you mean 'steps'?"),
    ('calibration.batchsize=4', "Did you mean 'batch_size'?"),
    ('synthesis.image_size=0', 'synthesis.image_size must be None, a positive integer or'),
    ('synthesis.image_size=-224', 'synthesis.image_size must be None, a positive integer or'),
    ('synthesis.priors.total_variation.weihgt=1', 'weihgt'),
    ('quantization.include=backbone.layers.*', "'backbone.layers.*' matches no module"),
    ('quantization.weight.observer.type=MinMaxx', "'MinMaxx' is not registered"),
    ('quant.weight.bits=4', "the config has no key 'quant'"),
    ('custom_hooks.0.type=Foo', "'Foo' is not registered"),
    ('custom_hooks.0.type=3', 'names no type of hook'),
    ('custom_hooks=Foo', "custom_hooks must be a list of hooks, got"),
    ('model.backbone.depths=2', 'the model of config'),
    ('log_level=LOUD', "log_level must be one of DEBUG, INFO, WARNING, ERROR, got 'LOUD'"),
    ('randomness.seed=-1', 'randomness.seed must be an integer from 0 to 2^32 - 1, got -1'),
])
def test_bad_settings(option, message, tmp_path, call_tool, small_config,
                      small_checkpoint):
    work_dir = tmp_path / 'out'
    status, out, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                                 work_dir, '--cfg-options', option)
    assert status == 2 and err.startswith('error: ') and message in err
    assert len(err.strip().splitlines()) <= 2 and 'Traceback' not in err
    assert not work_dir.exists()


def test_backbone_that_is_not_swin(tmp_path, call_tool, small_checkpoint):
    config = tmp_path / 'resnet.py'
    config.write_text("_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', "
                      "'mmdet::_base_/default_runtime.py', 'psaq_mm::_base_/w8a8.py']\n")
    status, _, err = call_tool('quantize', config, small_checkpoint, '--work-dir', tmp_path / 'o')
    assert status == 2 and 'ResNet' in err and 'Swin' in err
    assert not (tmp_path / 'o').exists()


def test_config_without_our_base(tmp_path, call_tool, demo_config, small_checkpoint):
    status, _, err = call_tool('quantize', demo_config, small_checkpoint, '--work-dir',
                               tmp_path / 'o')
    assert status == 2 and 'psaq_mm::_base_/w8a8.py' in err


@pytest.mark.parametrize('content', [None, 'model = dict(', "_base_ = './nowhere.py'\n", ''])
def test_bad_configs(content, tmp_path, call_tool, small_checkpoint):
    config = tmp_path / 'config.py'
    if content is not None:
        config.write_text(content)
    status, _, err = call_tool('quantize', config, small_checkpoint)
    assert status == 2 and 'config.py' in err and 'Traceback' not in err


def test_work_dir_that_cannot_be_written(tmp_path, call_tool, small_config,
                                         small_checkpoint):
    (tmp_path / 'file').write_text('')
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               tmp_path / 'file' / 'out')
    assert status == 2 and 'file' in err and 'Traceback' not in err


@pytest.mark.parametrize('device', ['cuda', 'cuda:99', 'gpu', 'meta'])
def test_device_that_is_not_there(device, tmp_path, call_tool, small_config,
                                  small_checkpoint):
    if device == 'cuda' and torch.cuda.is_available():
        pytest.skip('there is a GPU here')
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--device',
                               device, '--work-dir', tmp_path / 'o')
    assert status == 2 and f'--device {device}' in err
    assert not (tmp_path / 'o').exists()


def test_full_disk_keeps_the_old_checkpoint(tmp_path, call_tool, monkeypatch,
                                            small_config, small_checkpoint):
    """The last write fails as on a full disk: exit status, and the old file."""
    import errno

    from psaq_mm.checkpoint import atomic
    (tmp_path / 'quantized.pth').write_bytes(b'old')
    fsync = os.fsync

    def full(descriptor):
        if os.fstat(descriptor).st_size > 400_000:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return fsync(descriptor)

    monkeypatch.setattr(atomic.os, 'fsync', full)
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               tmp_path, '--cfg-options', *FEW, 'evolution.rounds=0')
    assert status == 2 and 'quantized.pth' in err and 'No space left' in err
    assert (tmp_path / 'quantized.pth').read_bytes() == b'old'
    assert not [p for p in tmp_path.iterdir() if 'tmp' in p.name]


def test_option_that_is_no_pair(call_tool, small_config, small_checkpoint):
    status, _, err = call_tool('quantize', small_config, small_checkpoint,
                               '--cfg-options', 'synthesis.steps')
    assert status == 2 and 'KEY=VALUE' in err and 'Traceback' not in err


def test_arguments_the_wrong_way_round(call_tool, small_config, small_checkpoint):
    status, _, err = call_tool('quantize', small_checkpoint, small_config)
    assert status == 2 and 'the config comes first' in err


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_seed_out_of_range(seed, tmp_path, call_tool, small_config, small_checkpoint):
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--seed', seed,
                               '--work-dir', tmp_path / 'o')
    assert status == 2 and '--seed must be' in err and not (tmp_path / 'o').exists()


def test_config_in_the_work_dir_stays_as_it_is(tmp_path, call_tool, small_config,
                                               small_checkpoint):
    """mmengine alone would write the merged config over it."""
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = '{small_config}'\n")
    before = config.read_text()
    status, _, err = call_tool('quantize', config, small_checkpoint, '--work-dir', tmp_path,
                               '--cfg-options', *FEW)
    assert status == 0, err
    assert config.read_text() == before


OWN = ('synthesis.num_images=1', 'synthesis.steps=1', 'synthesis.image_size=64',
       'test_dataloader.dataset.pipeline.1.scale=(64,32)', 'quantization.weight.rounding=nearest')


def test_own_images(tmp_path, call_tool, small_config, small_checkpoint, photos):
    """Log, report and manifest say how many they are, and nothing else of them."""
    arguments = (small_config, small_checkpoint, '--work-dir', tmp_path, '--device', 'cpu',
                 '--images', photos, '--max-images', 1, '--cfg-options', *OWN)
    status, _, err = call_tool('quantize', *arguments[:-len(OWN) - 1], '--show',
                               photos / '1.png', '--sensitivity-images', 0,
                               *arguments[-len(OWN) - 1:], page=True)
    assert status == 0, err
    page = (tmp_path / 'report.html').read_text()
    assert 'set on 1 of your own images' in page and page.count('data:image/jpeg') == 1
    assert 'Image 1: float ' in page and 'Sensitivity was not measured' in page
    used = dict(count=1, shape=[3, 32, 32], own=1, synthetic=0)
    report = json.loads((tmp_path / 'report.json').read_text())
    manifest = load_checkpoint_file(tmp_path / 'quantized.pth')['psaq_mm']
    assert report['images'] == manifest['images'] == used
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'images: 1 own of 32x32' in log and 'size of test images: 32x32, from the given' in log
    assert not (tmp_path / 'synthetic.png').exists() and 'synthesis' not in report['seconds']
    assert '--images IMAGES --max-images 1' in report['command']
    assert '--show IMAGES --sens' in report['command']
    for text in (log, json.dumps(report), json.dumps(manifest), page):
        assert str(photos) not in text and '.png' not in text.replace('synthetic.png', '')

    status, _, err = call_tool('quantize', *arguments, '--mix')
    assert status == 0, err
    assert json.loads((tmp_path / 'report.json').read_text())['images'] == dict(
        count=5, shape=[3, 32, 32], own=1, synthetic=1)
    assert Image.open(tmp_path / 'synthetic.png').size == (64, 64)  # the synthetic one alone
    (tmp_path / 'others').mkdir()
    Image.new('RGB', (64, 64)).save(tmp_path / 'others' / 'a.png')
    arguments = tuple(tmp_path / 'others' if value == photos else value for value in arguments)
    status, _, err = call_tool('quantize', *arguments, '--mix', '--resume')
    assert status == 2 and 'another images' in err


@pytest.mark.parametrize('options, message', [
    (('--images', 'none'), 'none does not exist'), (('--images', 'file'), 'file is a file'),
    (('--images', 'empty'), 'empty holds no images'),
    (('--images', 'broken'), 'none of the 1 images in'),
    (('--images', 'empty', '--max-images', '0'), '--max-images must be a positive integer'),
    (('--mix', ), '--mix needs --images'), (('--max-images', '3'), '--max-images needs --images')])
def test_bad_own_images(options, message, tmp_path, call_tool, monkeypatch, small_config,
                        small_checkpoint):
    (tmp_path / 'file').write_text('')
    for name in ('empty', 'broken'):
        (tmp_path / name).mkdir()
    (tmp_path / 'broken' / 'a.png').write_text('')
    monkeypatch.chdir(tmp_path)
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               'out', *options)
    last = err.splitlines()[-1]  # the log of the weights may come before it
    assert status == 2 and last.startswith('error: ') and message in last
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('options, message', [
    (['--target-size', '100KB'], 'target_size=100KB is below the smallest possible, '),
    (['--target-size', '1GB'], 'target_size=1GB is above the largest possible, '),
    (['--target-size', 'small'], "such as '12MB'"),
    (['--mean-bits', '1'], 'mean_bits=1 is below the smallest possible, 2'),
    (['--mean-bits', '4', '--max-drop', '1'], 'contradicts'),
    (['--mean-bits', '4', '--cfg-options', 'quantization.mean_bits=4'], 'give one of them'),
])
def test_budgets_that_cannot_be(options, message, tmp_path, call_tool, small_config,
                                small_checkpoint):
    status, _, err = call_tool('quantize', small_config, small_checkpoint, '--work-dir',
                               tmp_path / 'run', '--device', 'cpu', *options)
    assert status == 2 and message in err
    assert not (tmp_path / 'run').exists()


def test_target_size_holds_what_training_left(tmp_path, call_tool, small_config, small_checkpoint):
    """The config of the training is in the checkpoint, and so in that of the student."""
    checkpoint = torch.load(small_checkpoint, weights_only=True)
    checkpoint['meta'] = dict(cfg='model = dict()\n' * 2000)
    torch.save(checkpoint, tmp_path / 'trained.pth')
    status, _, err = call_tool(
        'quantize', small_config, tmp_path / 'trained.pth', '--work-dir', tmp_path / 'run',
        '--device', 'cpu', '--target-size', '440kB', '--sensitivity-images', 0, '--cfg-options',
        *FEW, 'evolution.rounds=0', 'synthesis.num_images=1', 'quantization.candidate_bits=[4,8]',
        page=True)
    assert status == 0, err
    size = (tmp_path / 'run' / 'quantized.pth').stat().st_size
    assert 0.9 * 440e3 < size <= 440e3
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'Chosen for target_size=440kB: ' in page and 'bits and sensitivity of each' in page
    assert (tmp_path / 'run' / f'{small_config.stem}_bits.py').exists()

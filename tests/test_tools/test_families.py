# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The two commands on every family: segmentors, cascades, classifiers."""
import json
import re
from pathlib import Path

import mmseg
import pytest
import torch
from conftest import DEMO, ROOT, load_script
from own_process import of_two, run_scripts
from safetensors.torch import save_file

from psaq_mm.checkpoint import STATE_KEY, float_checkpoint, load_checkpoint_file
from psaq_mm.engine import build_float_model, load_config

FAST = ['synthesis.num_images=2', 'synthesis.steps=2', 'synthesis.image_size=112',
        'evolution.rounds=1', 'evolution.sample_steps=1', 'evolution.student_steps=1',
        'evolution.batch_size=2']
#: Four blocks, and fewer channels and proposals, for what random weights do.
BACKBONE = dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
SMALL = dict(
    upernet_swin_demo=dict(
        backbone=BACKBONE, decode_head=dict(in_channels=[16, 32, 64, 128], channels=16),
        auxiliary_head=dict(in_channels=64, channels=16)),
    cascade_mask_rcnn_swin_demo=dict(
        backbone=BACKBONE, neck=dict(in_channels=[16, 32, 64, 128]),
        test_cfg=dict(rpn=dict(max_per_img=20))))
SMALLEST = ('mask_rcnn_swin_t_w8a8', 'upernet_swin_t_w6a6', 'deit_t_w4a8')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A few validation scenes in all their forms."""
    return write_scenes(tmp_path_factory.mktemp('scenes'), 4)


@pytest.fixture(scope='module')
def more_data(tmp_path_factory):
    """Enough of them to tell accuracies apart."""
    return write_scenes(tmp_path_factory.mktemp('more_scenes'), 16)


def write_scenes(folder, count):
    scenes = load_script(DEMO / 'scenes.py')
    scenes.write_split('val', folder, count)
    scenes.write_semantic('val', folder)
    scenes.write_crops('val', folder)
    return folder


@pytest.fixture(scope='module')
def make(data):
    """A quantized config of a demo model on those scenes, and random float weights for it;
    of a smaller model, unless it is to take the trained weights."""
    def build(name, base='w8a8', small=True):
        points = dict(
            upernet_swin_demo=dict(data_root=f'{data}/'),
            cascade_mask_rcnn_swin_demo=dict(data_root=f'{data}/'),
            swin_demo=dict(root=f'{data}/val_crops'), deit_demo=dict(root=f'{data}/val_crops'))
        config = data / f'{name}_{base}.py'
        bases = [str(DEMO / f'{name}.py'), str(ROOT / 'configs' / '_base_' / f'{base}.py')]
        config.write_text(f'_base_ = {bases!r}\n'
                          f'test_dataloader = dict(dataset={points[name]!r})\n')
        if 'cascade' in name:
            config.write_text(config.read_text()
                              + f"test_evaluator = dict(ann_file='{data}/val.json')\n")
        if small and name in SMALL:
            config.write_text(config.read_text() + f'model = {SMALL[name]!r}\n')
        torch.manual_seed(0)
        model = build_float_model(load_config(config))
        checkpoint = data / f'{name}.pth'
        torch.save(dict(state_dict=model.state_dict()), checkpoint)
        return config, checkpoint
    return build


@pytest.mark.parametrize('name, metric', [
    ('upernet_swin_demo', 'mIoU'), ('cascade_mask_rcnn_swin_demo', None),
    ('swin_demo', 'accuracy/top1'), ('deit_demo', 'accuracy/top1')])
@pytest.mark.parametrize('scope', ['backbone', 'model'])
def test_two_commands(call_tool, make, name, metric, scope, tmp_path):
    config, checkpoint = make(name)
    status, _, err = call_tool('quantize', config, checkpoint, '--work-dir', tmp_path,
                               '--cfg-options', *FAST, f'quantization.scope={scope}')
    assert status == 0, err
    report = json.loads((tmp_path / 'report.json').read_text())
    prefix = 'model.head' if name in ('swin_demo', 'deit_demo') else 'backbone.'
    heads = [m['name'] for m in report['modules']
             if m['name'].startswith(prefix) is (prefix == 'model.head')]
    assert bool(heads) is (scope == 'model')
    assert (tmp_path / 'synthetic.png').stat().st_size > 1000
    kinds = {tmp_path / 'quantized.pth': 'quantized (W8A8'}
    if scope == 'backbone':  # once of each model
        kinds[checkpoint] = 'float'
    for file, kind in kinds.items():
        status, out, err = call_tool('test', config, file, '--work-dir', tmp_path,
                                     '--metrics', tmp_path / 'metrics.json')
        assert status == 0, err
        assert f'{file}: {kind}' in out
        metrics = json.loads((tmp_path / 'metrics.json').read_text())['metrics']
        assert metric is None or 0 <= metrics[metric] <= 100


@pytest.mark.parametrize('name, metric, least, margin', [
    ('upernet_swin_demo', 'mIoU', 40, 4), ('swin_demo', 'accuracy/top1', 70, 9),
    ('deit_demo', 'accuracy/top1', 50, 9)])
def test_trained_models_keep_what_they_know(call_tool, make, more_data, name, metric, least,
                                            margin, tmp_path):
    """The demo's trained weights, on scenes that they never saw: at 8 bits they
    are as good as in float, within what so few images can tell."""
    config, _ = make(name, small=False)
    dataset = f'data_root={more_data}/' if name == 'upernet_swin_demo' \
        else f'root={more_data}/val_crops'
    checkpoint = DEMO / f'{name}.pth'
    status, _, err = call_tool('quantize', config, checkpoint, '--work-dir', tmp_path,
                               '--cfg-options', 'synthesis.num_images=4', 'synthesis.steps=5',
                               'synthesis.image_size=112', 'preset=fast')
    assert status == 0, err
    found = {}
    for file in (checkpoint, tmp_path / 'quantized.pth'):
        status, _, err = call_tool('test', config, file, '--work-dir', tmp_path, '--metrics',
                                   tmp_path / 'metrics.json', '--cfg-options',
                                   f'test_dataloader.dataset.{dataset}')
        assert status == 0, err
        found[file.stem] = json.loads((tmp_path / 'metrics.json').read_text())['metrics'][metric]
    assert found[name] > least
    assert abs(found['quantized'] - found[name]) < margin


def test_stock_mmseg_tool(call_tool, make, data, tmp_path):
    """mmseg's own script on a config that inherits by path: the same mIoU.
    (With mmseg:: in it, mmengine of one family fails before any code of ours.)"""
    config, checkpoint = make('upernet_swin_demo', 'w4a4')
    status, _, err = call_tool('quantize', config, checkpoint, '--work-dir', tmp_path,
                               '--cfg-options', *FAST)
    assert status == 0, err
    by_path = tmp_path / 'by_path.py'
    host = Path(mmseg.__file__).parent / '.mim' / 'configs' / '_base_'
    text = (DEMO / 'upernet_swin_demo.py').read_text()
    for name in ('models/upernet_swin.py', 'default_runtime.py'):
        assert f"'mmseg::_base_/{name}'" in text
        text = text.replace(f'mmseg::_base_/{name}', str(host / name))
    own = ROOT / 'configs' / '_base_' / 'w4a4.py'
    text = text.replace("default_runtime.py']", f"default_runtime.py', '{own}']")
    text = text.replace("'{{ fileDirname }}/data/'", f"'{data}/'")
    by_path.write_text(text + ''.join(f"model['{part}'].update({changes})\n" for part, changes
                                      in SMALL['upernet_swin_demo'].items()))
    stock = Path(mmseg.__file__).parent / '.mim' / 'tools' / 'test.py'
    run, = run_scripts(tmp_path, stock, by_path, tmp_path / 'quantized.pth', '--work-dir',
                       tmp_path / 'stock')
    assert run.returncode == 0, run.stdout[-3000:]
    report = json.loads((tmp_path / 'report.json').read_text())
    assert f'is quantized: {len(report["modules"])} modules' in run.stdout
    miou = re.findall(r'mIoU: (\d+\.\d+)', run.stdout)[-1]
    status, out, err = call_tool('test', config, tmp_path / 'quantized.pth', '--work-dir',
                                 tmp_path, '--metrics', tmp_path / 'metrics.json')
    assert status == 0, err
    ours = json.loads((tmp_path / 'metrics.json').read_text())['metrics']['mIoU']
    assert f'{ours:.4f}' == miou


def test_segmentations_are_drawn(make, tmp_path):
    """In a process of its own: mmengine keeps one visualizer of a name in each."""
    config, checkpoint = make('upernet_swin_demo')
    run, = run_scripts(tmp_path, ROOT / 'tools' / 'test.py', config, checkpoint, '--work-dir',
                       tmp_path, '--show-dir', 'drawn')
    assert run.returncode == 0, run.stdout[-3000:]
    assert len(list(tmp_path.glob('drawn/**/*.png'))) == 4


def test_nothing_to_draw_with(call_tool, make, tmp_path):
    config, checkpoint = make('swin_demo')
    status, _, err = call_tool('test', config, checkpoint, '--work-dir', tmp_path / 'out',
                               '--show-dir', 'drawn')
    assert status == 2
    assert 'default_hooks.visualization' in err
    assert not (tmp_path / 'out').exists()


def test_timm_weights_from_safetensors(call_tool, make, tmp_path, caplog):
    """timm's own keys and file format give the same quantized model."""
    config, checkpoint = make('deit_demo')
    state = torch.load(checkpoint)['state_dict']
    save_file({k[len('model.'):]: v for k, v in state.items() if k.startswith('model.')},
              str(tmp_path / 'model.safetensors'))
    results = []
    for file in (checkpoint, tmp_path / 'model.safetensors'):
        status, _, err = call_tool('quantize', config, file, '--work-dir', tmp_path / 'out',
                                   '--cfg-options', *FAST)
        assert status == 0, err
        results.append(load_checkpoint_file(tmp_path / 'out' / 'quantized.pth')[STATE_KEY])
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_images_of_another_size(call_tool, make, tmp_path):
    config, checkpoint = make('deit_demo')
    status, _, err = call_tool('quantize', config, checkpoint, '--work-dir', tmp_path / 'out',
                               '--cfg-options', 'synthesis.image_size=224')
    assert status == 2
    assert 'synthesis.image_size' in err
    assert '112' in err
    assert not (tmp_path / 'out').exists()


def test_last_ranges_at_another_size(call_tool, make, tmp_path):
    config, checkpoint = make('swin_demo')
    status, _, err = call_tool('quantize', config, checkpoint, '--work-dir', tmp_path / 'out',
                               '--cfg-options', *FAST, 'calibration.image_size=224')
    assert status == 2
    assert 'calibration.image_size' in err and '112' in err
    assert not (tmp_path / 'out').exists()


def test_batch_norm_prior(call_tool, make, quantization_config, demo_checkpoint, tmp_path):
    """By one option where heads have the statistics; refused at once elsewhere."""
    prior = 'synthesis.priors.batch_norm.type=BatchNormPrior'
    config, checkpoint = make('upernet_swin_demo')
    status, _, err = call_tool('quantize', config, checkpoint, '--work-dir', tmp_path / 'with',
                               '--cfg-options', *FAST, prior)
    assert status == 0, err
    losses = json.loads((tmp_path / 'with' / 'report.json').read_text())['losses']
    assert len(losses['batch_norm']) == 4
    status, _, err = call_tool('quantize', quantization_config, demo_checkpoint, '--work-dir',
                               tmp_path / 'without', '--cfg-options', prior)
    assert status == 2
    assert 'synthesis.priors.batch_norm needs BatchNorm statistics' in err
    assert not (tmp_path / 'without').exists()


def test_classifier_of_another_size(call_tool, make, tmp_path):
    """The differences are named; nothing is resized in silence."""
    config, _ = make('swin_demo')
    other = build_float_model(load_config(ROOT / 'configs' / 'swin_t.py'))
    torch.save(dict(model=other.model.state_dict()), tmp_path / 'swin_t.pth')
    status, _, err = call_tool('quantize', config, tmp_path / 'swin_t.pth', '--work-dir',
                               tmp_path / 'out', '--cfg-options', *FAST)
    assert status == 2
    assert 'is not a checkpoint of this model' in err


@pytest.mark.parametrize('name, launched', [('swin_demo', True), ('upernet_swin_demo', False)])
def test_two_processes(call_tool, make, name, launched, tmp_path):
    """--launcher pytorch splits the images: the same metrics. By torchrun once, which starts
    processes that import all."""
    config, checkpoint = make(name)
    arguments = [str(config), str(checkpoint), '--work-dir', str(tmp_path)]
    command = [ROOT / 'tools' / 'test.py', *arguments, '--launcher', 'pytorch', '--metrics',
               tmp_path / 'two.json', '--cfg-options', 'test_dataloader.batch_size=1']
    torchrun = ['-m', 'torch.distributed.run', '--nproc_per_node', 2, '--standalone']
    for run in run_scripts(tmp_path, *torchrun, *command) if launched else run_scripts(
            tmp_path, *command, environments=of_two()):
        assert run.returncode == 0, run.stdout[-3000:]
    status, _, err = call_tool('test', *arguments, '--metrics', tmp_path / 'one.json')
    assert status == 0, err
    one, two = (json.loads((tmp_path / f'{n}.json').read_text())['metrics']
                for n in ('one', 'two'))
    assert one == two


def test_launcher_without_processes(call_tool, make, tmp_path, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    config, checkpoint = make('swin_demo')
    for options, expected in ((['--launcher', 'pytorch'], 'torchrun'),
                              (['--launcher', 'pytorch', '--device', 'cpu'], '--device cpu')):
        status, _, err = call_tool('test', config, checkpoint, '--work-dir', tmp_path / 'out',
                                   *options)
        assert status == 2
        assert expected in err
    monkeypatch.setenv('WORLD_SIZE', '2')  # and the launcher is not named
    status, _, err = call_tool('test', config, checkpoint, '--work-dir', tmp_path / 'out')
    assert status == 2 and 'add --launcher pytorch' in err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('processes, expected', [
    (8, 'evolution.batch_size must be a multiple of the 8 processes, got 4; try 8'),
    (9, 'synthesis.num_images must be at least the 9 processes, got 8')])
def test_processes_that_cannot_share(processes, expected, call_tool, make, tmp_path, monkeypatch):
    """Before anything is made, not after the images."""
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', str(processes))
    config, checkpoint = make('upernet_swin_demo')
    status, _, err = call_tool('quantize', config, checkpoint, '--work-dir', tmp_path / 'out',
                               '--launcher', 'pytorch', '--cfg-options', 'evolution.rounds=5')
    assert status == 2 and expected in err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('options, expected', [
    (['test_dataloader.dataset.transform.interpolation=foo'], 'ImageFolder: transform'),
    (['test_dataloader.dataset.transform.crop_pct=abc'], 'ImageFolder: transform'),
    (['test_dataloader.dataset.transform.input_size=112'], 'transform.input_size must be'),
    (['test_dataloader.dataset.model=swin_tinny'], "'swin_tinny' is no model of timm"),
    (['model.pretrained=True'], 'takes no pretrained'),
    (['model.name=resnet18'], "timm cannot build 'resnet18'")])
def test_mistakes_in_a_classifier(call_tool, make, options, expected, tmp_path):
    config, checkpoint = make('swin_demo')
    status, _, err = call_tool('test', config, checkpoint, '--work-dir', tmp_path / 'out',
                               '--cfg-options', *options)
    assert status == 2
    assert expected in err


@pytest.mark.parametrize('options, expected', [
    (["test_dataloader.dataset.transform.input_size=(3,224,224)"],
     r'transform.input_size=(3, 112, 112)'),
    (['test_evaluator.topk=None'], 'topk must be')])
def test_mistakes_found_later(call_tool, make, options, expected, tmp_path):
    config, checkpoint = make('swin_demo')
    status, _, err = call_tool('test', config, checkpoint, '--work-dir', tmp_path / 'out',
                               '--cfg-options', *options)
    assert status == 2
    assert expected in err


def test_folders_of_other_classes(call_tool, make, data, tmp_path):
    """Labels are places in a list of folders: another list is another task."""
    config, checkpoint = make('swin_demo')
    part = tmp_path / 'part'
    for name in ('ring', 'star'):
        (part / name).mkdir(parents=True)
        source = next((data / 'val_crops' / name).glob('*.png'))
        (part / name / source.name).write_bytes(source.read_bytes())
    arguments = ['test', config, checkpoint, '--work-dir', tmp_path, '--cfg-options',
                 f'test_dataloader.dataset.root={part}']
    status, _, err = call_tool(*arguments)
    assert status == 2
    assert 'the data set has 2 class folders, the model 6 classes' in err
    for name in ('cross', 'disc', 'square', 'triangle'):  # what the message suggests
        (part / name).mkdir()
    status, _, err = call_tool(*arguments)
    assert status == 0, err


def test_layout_is_named_once(make, tmp_path):
    """A published segmentor through tools/test.py."""
    config, checkpoint = make('upernet_swin_demo')
    layouts = load_script(ROOT / 'benchmarks' / 'published_layouts.py')
    state = torch.load(checkpoint)['state_dict']
    torch.save(dict(model=layouts.to_swin_authors_detection(state)), tmp_path / 'swin.pth')
    run, = run_scripts(tmp_path, ROOT / 'tools' / 'test.py', config, tmp_path / 'swin.pth',
                       '--work-dir', tmp_path)
    assert run.returncode == 0, run.stdout[-3000:]
    named = re.findall('layout of the weights: (.*)', run.stdout)
    assert named == ['Swin authors (mmdet 2 and mmseg 0 keys)']


@pytest.mark.parametrize('name', SMALLEST)
def test_full_run_would_start(name, call_tool, monkeypatch, tmp_path):
    """A small shipped config of each host. make reproduce-dry-run does all, as a user would.
    Here in this process, since to import the hosts takes as long as a run, and on images of
    full size, with game and GPTQ, for the narrow model alone: each takes as long again for
    the others."""
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    script, lines = load_script(ROOT / 'benchmarks' / 'reproduce_dry_run.py'), []

    def call(tool, *arguments):
        wide = not name.startswith('deit')
        size = 'test_dataloader.dataset.pipeline.1.scale=(320,256)'
        fewer = dict(quantize=['quantization.weight.rounding=nearest', 'evolution.rounds=0', size],
                     test=['test_dataloader.dataset.indices=1', size])  # of two images
        status, _, err = call_tool(Path(tool).stem, *arguments,
                                   *(fewer[Path(tool).stem] if wide else []))
        assert status == 0, err
        return 0., '\n'.join(lines)

    monkeypatch.setattr(script, 'call', call)
    monkeypatch.setattr(float_checkpoint, 'print_log', lambda line, **kwargs: lines.append(line))
    assert script.dry_run(name, tmp_path).startswith(f'| {name} |')


def test_deeper_model(call_tool, make, tmp_path):
    """All weights of the config's model are there, and more: of another model."""
    config, checkpoint = make('upernet_swin_demo')
    state = torch.load(checkpoint)['state_dict']
    state['backbone.stages.2.blocks.4.norm1.weight'] = torch.ones(128)
    torch.save(dict(state_dict=state), tmp_path / 'deeper.pth')
    status, _, err = call_tool('quantize', config, tmp_path / 'deeper.pth', '--work-dir',
                               tmp_path / 'out')
    assert status == 2
    assert 'unexpected: backbone.stages.2.blocks.4.norm1.weight' in err

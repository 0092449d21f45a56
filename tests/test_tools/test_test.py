# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""tools/test.py, and mmdet's own: float and quantized checkpoints alike."""
import json
import re
import uuid
from pathlib import Path

import mmdet
import pytest
import torch
from conftest import DEMO, ROOT, load_script
from mmengine.registry import VISBACKENDS
from mmengine.visualization import LocalVisBackend
from own_process import run_scripts

import psaq_mm
from psaq_mm.engine import build_float_model, load_config

IMAGES = 12


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A few validation scenes."""
    folder = tmp_path_factory.mktemp('scenes')
    load_script(DEMO / 'scenes.py').write_split('val', folder, IMAGES)
    return folder


@pytest.fixture(scope='module')
def configs(data, demo_config):
    """The float config and the one with our base by path, on those scenes."""
    common = (f"test_dataloader = dict(dataset=dict(data_root='{data}/'))\n"
              f"test_evaluator = dict(ann_file='{data}/val.json')\n")
    plain, quantized = data / 'plain.py', data / 'quantized.py'
    plain.write_text(f"_base_ = ['{demo_config}']\n" + common)
    base = ROOT / 'configs' / '_base_' / 'w8a8.py'
    quantized.write_text(f"_base_ = ['{demo_config}', '{base}']\n" + common)
    return plain, quantized


@pytest.fixture(scope='module')
def quantized_checkpoint(data, configs, demo_checkpoint):
    """Quantized from Python."""
    model = build_float_model(load_config(configs[1]))
    model.load_state_dict(torch.load(demo_checkpoint, weights_only=True)['state_dict'])
    recipe = psaq_mm.Recipe().changed(dict(
        synthesis=dict(num_images=2, batch_size=2, steps=2)))
    psaq_mm.save(psaq_mm.quantize(model, recipe), data / 'quantized.pth')
    return data / 'quantized.pth'


def test_float_and_quantized(call_tool, configs, demo_checkpoint, quantized_checkpoint,
                             tmp_path):
    """The same tool and config take both, and say which one it is."""
    box = {}
    for name, checkpoint, kind in (('float', demo_checkpoint, 'float'),
                                   ('quantized', quantized_checkpoint, 'quantized (W8A8')):
        status, out, err = call_tool('test', configs[1], checkpoint, '--work-dir', tmp_path,
                                     '--metrics', tmp_path / f'{name}.json')
        assert status == 0, err
        assert f'{checkpoint}: {kind}' in out
        metrics = json.loads((tmp_path / f'{name}.json').read_text())['metrics']
        assert metrics['coco/segm_mAP'] > 0.5
        box[name] = metrics['coco/bbox_mAP']
    assert box['float'] > 0.5  # the detector works
    assert abs(box['float'] - box['quantized']) < 0.03


def test_ap_is_that_of_pycocotools(call_tool, configs, demo_checkpoint, tmp_path):
    """The number that the tool prints, computed again from dumped results."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    prefix = tmp_path / 'dump'
    status, _, err = call_tool('test', configs[1], demo_checkpoint, '--work-dir', tmp_path,
                               '--metrics', tmp_path / 'm.json', '--cfg-options',
                               f'test_evaluator.outfile_prefix={prefix}')
    assert status == 0, err
    truth = COCO(str(configs[1].parent / 'val.json'))
    evaluation = COCOeval(truth, truth.loadRes(f'{prefix}.bbox.json'), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    printed = json.loads((tmp_path / 'm.json').read_text())['metrics']['coco/bbox_mAP']
    assert printed == pytest.approx(evaluation.stats[0], abs=6e-4)


def test_plain_mmdet_config(call_tool, configs, demo_checkpoint, quantized_checkpoint, tmp_path):
    """No key of ours is needed, not even for a quantized checkpoint."""
    for checkpoint in (demo_checkpoint, quantized_checkpoint):
        status, out, err = call_tool('test', configs[0], checkpoint, '--work-dir', tmp_path)
        assert status == 0, err
        assert 'coco/bbox_mAP' in out


@VISBACKENDS.register_module()
class SpyVisBackend(LocalVisBackend):
    """Stands for one that opens a session."""
    opened = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        SpyVisBackend.opened += 1


@pytest.fixture
def training_config(configs, data):
    """A config as it was trained with: hooks of training, resumed, and watched from afar."""
    config = data / 'training.py'
    config.write_text(
        f"_base_ = '{configs[0]}'\nresume = True\n"
        "custom_hooks = [dict(type='EMAHook', momentum=0.0002), dict(type='SetEpochInfoHook')]\n"
        # mmengine would hand out the visualizer of the test before, if this had its name.
        f"visualizer = dict(name='{uuid.uuid4().hex}', vis_backends=["
        "dict(type='LocalVisBackend'), dict(type='SpyVisBackend')])\n"
        "recipe = 'w8a8'\n")
    return config


@pytest.mark.parametrize('asked', [False, True])
def test_config_of_a_training(call_tool, training_config, quantized_checkpoint, tmp_path, asked):
    """Nothing of it stands in the way of a test, or is told what is tested."""
    before = SpyVisBackend.opened
    status, out, err = call_tool(
        'test', training_config, quantized_checkpoint, '--work-dir', tmp_path, '--metrics',
        tmp_path / 'm.json', *['--use-vis-backends'] * asked)
    assert status == 0, err
    assert SpyVisBackend.opened - before == asked
    assert ('not used: SpyVisBackend' in out) != asked
    metrics = json.loads((tmp_path / 'm.json').read_text())['metrics']
    assert metrics['coco/bbox_mAP'] > 0.5  # averaged weights would be the float model's or none


@pytest.mark.parametrize('asked', [False, True])
def test_quantizing_tells_nobody(call_tool, training_config, demo_checkpoint, tmp_path, asked):
    before = SpyVisBackend.opened
    status, out, err = call_tool(
        'quantize', training_config, demo_checkpoint, '--work-dir', tmp_path,
        *['--use-vis-backends'] * asked, '--cfg-options', 'synthesis.num_images=2',
        'synthesis.steps=1', 'synthesis.image_size=64', 'quantization.weight.rounding=nearest',
        'log_level=WARNING')
    assert status == 0, err
    assert SpyVisBackend.opened - before == asked
    assert ('not used: SpyVisBackend' in out) != asked


def test_nothing_to_measure(call_tool, configs, demo_checkpoint, tmp_path):
    """No box at all: said, and the file of metrics can be read by anybody."""
    status, out, err = call_tool(
        'test', configs[0], demo_checkpoint, '--work-dir', tmp_path, '--metrics',
        tmp_path / 'm.json', '--cfg-options', 'model.test_cfg.rcnn.score_thr=1.1')
    assert status == 0, err
    assert 'no metric: ' in out

    def refuse(name):
        raise AssertionError(f'{name} is no JSON')

    assert json.loads((tmp_path / 'm.json').read_text(), parse_constant=refuse)['metrics'] == {}


def test_stock_mmdet_tool(configs, quantized_checkpoint, call_tool, tmp_path):
    """mmdet's unmodified script gives our tool's AP, to the last digit."""
    stock = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'test.py'
    process, = run_scripts(tmp_path, stock, configs[1], quantized_checkpoint, '--work-dir',
                           tmp_path)
    assert process.returncode == 0, process.stdout
    assert 'is quantized: ' in process.stdout  # the hook ran
    stock_ap = {k: float(re.findall(rf'coco/{k}_mAP: (\S+)', process.stdout)[-1])
                for k in ('bbox', 'segm')}
    status, out, err = call_tool('test', configs[1], quantized_checkpoint, '--work-dir', tmp_path)
    assert status == 0, err
    ours = {k: float(re.findall(rf'coco/{k}_mAP: (\S+)', out)[-1]) for k in ('bbox', 'segm')}
    assert stock_ap == ours


def test_stock_mmdet_tool_refuses_another_model(configs, quantized_checkpoint, tmp_path):
    """mmengine alone would warn, and evaluate random weights."""
    stock = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'test.py'
    process, = run_scripts(tmp_path, stock, configs[1], quantized_checkpoint, '--work-dir',
                           tmp_path, '--cfg-options', 'model.backbone.embed_dims=48',
                           'model.neck.in_channels=[48,96,192,384]')
    assert process.returncode != 0
    assert 'backbone.patch_embed.projection.weight' in process.stdout


def test_missing_data(call_tool, quantization_config, demo_checkpoint, tmp_path):
    status, _, err = call_tool('test', quantization_config, demo_checkpoint, '--work-dir',
                               tmp_path / 'o', '--cfg-options',
                               'test_dataloader.dataset.data_root=/nowhere/')
    assert status == 2 and '/nowhere/val.json' in err
    assert not (tmp_path / 'o').exists()


@pytest.mark.parametrize('option, message', [
    ('test_evaluator.ann_file=/nowhere/val.json',
     'test_evaluator.ann_file: /nowhere/val.json does not exist'),
    ('custom_hooks=[foo]', "custom_hooks: 'foo' names no type of hook")])
def test_bad_settings(option, message, call_tool, configs, demo_checkpoint, tmp_path):
    status, _, err = call_tool('test', configs[0], demo_checkpoint, '--work-dir', tmp_path / 'o',
                               '--cfg-options', option)
    assert status == 2 and message in err and 'Traceback' not in err
    assert not (tmp_path / 'o').exists()


def test_checkpoint_of_another_model(call_tool, configs, tmp_path):
    torch.save(dict(state_dict={'conv1.weight': torch.zeros(2)}), tmp_path / 'other.pth')
    status, _, err = call_tool('test', configs[1], tmp_path / 'other.pth', '--work-dir', tmp_path)
    assert status == 2 and 'backbone.patch_embed.projection.weight' in err


def test_real_photographs(call_tool, tmp_path):
    """Both commands on a real detector, where its files are present."""
    bccd = ROOT.parent / 'shared' / 'real' / 'bccd'
    if not bccd.exists():
        pytest.skip('the BCCD detector is not here')
    truth = json.loads((bccd / 'test.json').read_text())
    keep = {image['id'] for image in truth['images'][:10]}
    truth['images'] = truth['images'][:10]
    truth['annotations'] = [a for a in truth['annotations'] if a['image_id'] in keep]
    (tmp_path / 'ten.json').write_text(json.dumps(truth))
    config = tmp_path / 'bccd_w8a8.py'
    config.write_text(
        f"_base_ = ['{bccd / 'mask_rcnn_swin_bccd.py'}', 'psaq_mm::_base_/w8a8.py']\n"
        f"test_dataloader = dict(dataset=dict(ann_file='{tmp_path / 'ten.json'}'))\n"
        f"test_evaluator = dict(ann_file='{tmp_path / 'ten.json'}')\n")
    checkpoint = bccd / 'mask_rcnn_swin_bccd.pth'
    status, _, err = call_tool('quantize', config, checkpoint, '--work-dir', tmp_path,
                               '--cfg-options', 'synthesis.steps=5', 'synthesis.num_images=2',
                               'evolution.rounds=1', 'evolution.sample_steps=2',
                               'evolution.student_steps=2', 'evolution.batch_size=2')
    assert status == 0, err
    box = []
    for file in (checkpoint, tmp_path / 'quantized.pth'):
        status, out, err = call_tool('test', config, file, '--work-dir', tmp_path)
        assert status == 0, err
        box.append(float(re.findall(r'coco/bbox_mAP: (\S+)', out)[-1]))
    assert box[0] > 0.5 and abs(box[0] - box[1]) < 0.03

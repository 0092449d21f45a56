# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""tools/export.py, tools/benchmark.py, and tools/test.py with an engine."""
import json
import os
import re
import sys

import pytest
import torch
from conftest import DEMO, ROOT, load_script, plain_student
from own_process import run_scripts

import psaq_mm
from psaq_mm.deploy.export_manifest import write_export
from psaq_mm.engine import build_float_model, load_config

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')

IMAGES = 6


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A few validation scenes, a config that names them, and a quantized demo detector."""
    folder = tmp_path_factory.mktemp('scenes')
    load_script(DEMO / 'scenes.py').write_split('val', folder, IMAGES)
    config = folder / 'detector_w8a8.py'
    config.write_text(
        f"_base_ = ['{DEMO / 'mask_rcnn_swin_demo.py'}', '{ROOT / 'configs/_base_/w8a8.py'}']\n"
        f"test_dataloader = dict(dataset=dict(data_root='{folder}/'))\n"
        f"test_evaluator = dict(ann_file='{folder}/val.json')\n")
    model = build_float_model(load_config(config))
    model.load_state_dict(torch.load(DEMO / 'mask_rcnn_swin_demo.pth',
                                     weights_only=True)['state_dict'])
    psaq_mm.save(plain_student(model, torch.randn(2, 3, 224, 224)), folder / 'quantized.pth')
    return folder


def metrics_of(call_tool, data, tmp_path, *options):
    status, out, err = call_tool(
        'test', data / 'detector_w8a8.py', data / 'quantized.pth', '--work-dir', tmp_path,
        '--metrics', tmp_path / 'm.json', *options)
    assert status == 0, err
    return json.loads((tmp_path / 'm.json').read_text()), out


@pytest.fixture(scope='module')
def simulated(data, tmp_path_factory):
    """Metrics of the simulation, evaluated once."""
    found = []

    def metrics(call_tool):
        if not found:
            found.append(metrics_of(call_tool, data, tmp_path_factory.mktemp('simulated'))[0])
        return found[0]

    return metrics


@pytest.mark.parametrize('target, backend', [('onnx', 'onnxruntime'), ('openvino', 'openvino')])
def test_export_and_evaluate(call_tool, data, simulated, tmp_path, target, backend):
    """AP of what was exported is that of the simulation."""
    status, out, err = call_tool(
        'export', data / 'detector_w8a8.py', data / 'quantized.pth', '--format', target,
        '--size', 224, 224, '--out', tmp_path / 'graphs')
    assert status == 0, err
    assert '1 graph(s) of backbone + neck + rpn_head + roi_head' in out
    manifest = json.loads((tmp_path / 'graphs' / 'export.json').read_text())
    agreement = manifest['graphs'][0]['agreement']
    assert agreement['compared'] > 20
    assert all(agreement[key] > 0.6 * own > 0.3 for key, own in agreement['own'].items())
    assert manifest['graphs'][0]['size'] == [224, 224]
    simulated = simulated(call_tool)
    engine, out = metrics_of(call_tool, data, tmp_path, '--backend', backend, '--exported',
                             tmp_path / 'graphs', '--threads', 1)
    assert re.search(rf'run by {backend} \S+, 1 thread, fp32', out)
    assert simulated['backend'].startswith('torch') and engine['backend'].startswith(backend)
    for key in ('coco/bbox_mAP', 'coco/segm_mAP'):
        # Few images: one box that moves is more than in a whole test set.
        assert abs(simulated['metrics'][key] - engine['metrics'][key]) < 0.02
    assert engine['metrics']['coco/bbox_mAP'] > 0.5


def test_evaluate_features(call_tool, data, tmp_path):
    """The other part: mmdet does the rest in torch."""
    status, out, err = call_tool(
        'export', data / 'detector_w8a8.py', data / 'quantized.pth', '--format', 'onnx',
        '--part', 'features', '--size', 224, 224, '--out', tmp_path / 'graphs')
    assert status == 0 and '1 graph(s) of backbone + neck + rpn_head,' in out, err
    engine, _ = metrics_of(call_tool, data, tmp_path, '--backend', 'onnxruntime', '--exported',
                           tmp_path / 'graphs')
    assert engine['metrics']['coco/bbox_mAP'] > 0.5


def test_an_engine_that_decides_otherwise(call_tool, data, tmp_path):
    """Status 1, a reason, and files to look at."""
    status, _, err = call_tool(
        'export', data / 'detector_w8a8.py', data / 'quantized.pth', '--format', 'onnx',
        '--size', 224, 224, '--out', tmp_path / 'graphs', '--least-share', 3,
        '--check-images', data / 'val' / '000000.png')
    assert status == 1 and 'decides otherwise' in err and ' % are expected' in err
    assert (tmp_path / 'graphs' / 'model_224x224.onnx').exists()
    assert (tmp_path / 'graphs' / 'export.json').exists()


def test_evaluate_exports_by_itself(call_tool, data, tmp_path):
    engine, _ = metrics_of(call_tool, data, tmp_path, '--backend', 'onnxruntime')
    assert engine['metrics']['coco/bbox_mAP'] > 0.5
    assert (tmp_path / 'test_export_onnx' / 'model.onnx').exists()
    assert not (tmp_path / 'export_onnx').exists()  # that is of tools/export.py


@pytest.fixture
def affinity():
    """The tool pins its own process, which here is that of the tests."""
    threads, cores = torch.get_num_threads(), None
    if hasattr(os, 'sched_getaffinity'):
        cores = os.sched_getaffinity(0)
    yield
    torch.set_num_threads(threads)
    if cores is not None:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize('part', ['model', 'features'])
def test_benchmark(call_tool, data, tmp_path, affinity, part, monkeypatch):
    tool = load_script(ROOT / 'tools' / 'benchmark.py')
    measure = tool.peak_in_process

    def peak(job):  # by the command itself once, as its imports take long
        if part == 'model' and 'int8' in job.get('file', ''):
            return measure(job)
        done, = run_scripts(tmp_path, '-m', 'psaq_mm.deploy.peak_memory', json.dumps(job))
        assert done.returncode == 0, done.stdout
        return json.loads(done.stdout.splitlines()[-1])

    monkeypatch.setattr(tool, 'peak_in_process', peak)
    status, out, err = call_tool(
        'benchmark', data / 'detector_w8a8.py', data / 'quantized.pth', '--work-dir', tmp_path,
        '--engines', 'onnxruntime', '--size', 64, 64, '--rounds', 2, '--no-accuracy',
        '--part', part)
    assert status == 0, err
    report = json.loads((tmp_path / 'benchmark.json').read_text())
    rows = {row['side']: row for row in report['rows']}
    assert list(rows) == ['torch fp32', *(['torch bf16'] if part == 'features' else []),
                          'torch simulated int8', 'onnxruntime fp32', 'onnxruntime int8']
    for row in rows.values():
        assert 0 < row['median_ms'] <= row['p90_ms'] and row['images_per_second'] > 0
    if sys.platform == 'linux':
        assert all(row['peak_mib'] > 0 for row in rows.values())
    assert rows['onnxruntime int8']['megabytes'] < 0.5 * rows['onnxruntime fp32']['megabytes']
    assert rows['torch fp32']['speed'] == 1
    assert (tmp_path / 'benchmark.png').read_bytes()[:4] == b'\x89PNG'
    assert '| onnxruntime int8 |' in out


@pytest.mark.parametrize('options, words', [
    (['--threads', 2], '--threads is for engines'),
    (['--engine-device', 'GPU'], '--engine-device is for engines'),
    (['--backend', 'openvino', '--engine-device', 'TPU'], 'device TPU: openvino'),
    (['--backend', 'onnxruntime', '--precision', 'bf16'], 'onnxruntime on a CPU has fp32 only'),
    (['--backend', 'openvino', '--exported', '/nowhere'], '/nowhere/export.json'),
    (['--backend', 'openvino', '--threads', -1], '--threads must be'),
])
def test_mistakes(call_tool, data, tmp_path, options, words):
    """Said before a model is built, and nothing is written."""
    status, _, err = call_tool('test', data / 'detector_w8a8.py', data / 'quantized.pth',
                               '--work-dir', tmp_path / 'o', *options)
    assert status == 2 and words in err
    assert not (tmp_path / 'o').exists()


def test_mistakes_of_export_and_benchmark(call_tool, data, tmp_path):
    config, checkpoint = data / 'detector_w8a8.py', data / 'quantized.pth'
    status, _, err = call_tool('export', config, tmp_path / 'no.pth', '--format', 'onnx',
                               '--out', tmp_path / 'o')
    assert status == 2 and 'no.pth' in err
    status, _, err = call_tool('export', config, checkpoint, '--format', 'onnx', '--out',
                               tmp_path / 'o', '--float-roles', 'querry')
    assert status == 2 and 'querry' in err
    for option, value in (('--check-images', data / 'val'), ('--least-share', 0.5)):
        status, _, err = call_tool('export', config, checkpoint, '--format', 'onnx', '--out',
                                   tmp_path / 'o', '--part', 'features', option, value)
        assert status == 2 and f'{option} is of whole models' in err
    status, _, err = call_tool(
        'export', config, checkpoint, '--format', 'onnx', '--out', tmp_path / 'o',
        '--check-images', data / 'val', '--cfg-options',
        'test_dataloader.dataset.pipeline.1.interpolation=bicubic')
    assert status == 2 and '--check-images: ' in err and 'interpolation=bicubic' in err
    status, _, err = call_tool('benchmark', config, DEMO / 'mask_rcnn_swin_demo.pth',
                               '--work-dir', tmp_path / 'o')
    assert status == 2 and 'is not quantized' in err
    assert not (tmp_path / 'o').exists()


def test_engine_absent(call_tool, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    status, _, err = call_tool('test', data / 'detector_w8a8.py', data / 'quantized.pth',
                               '--work-dir', tmp_path / 'o', '--backend', 'openvino')
    assert status == 2 and "'.[deploy]'" in err


def test_graphs_of_another_checkpoint(call_tool, data, tmp_path):
    write_export(dict(format='onnx', source=dict(sha256='0', checkpoint='other.pth'),
                      output_names=['feature_0'], graphs=[]), tmp_path)
    status, _, err = call_tool(
        'test', data / 'detector_w8a8.py', data / 'quantized.pth', '--work-dir', tmp_path,
        '--backend', 'onnxruntime', '--exported', tmp_path)
    assert status == 2 and 'another checkpoint (other.pth)' in err

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Models and files that several tests need."""
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import cv2
import pytest
import torch
from own_process import run_scripts

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / 'demo'
SINGLE_STAGE = dict(retinanet='retinanet/retinanet_r50_fpn_1x_coco.py',
                    fcos='fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')


@pytest.fixture(scope='session', autouse=True)
def _quick_configs():
    """Leave out what takes a second of each config: the layout of its text by yapf, and the
    same metafiles of a host, read again. Processes of their own do both."""
    from mmengine.config import config, utils
    from yapf.yapflib import yapf_api
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, 'load', functools.lru_cache(None)(utils.load))
        for module in (config, yapf_api):  # mmengine imports it at once or when it is used
            patch.setattr(module, 'FormatCode', lambda text, **_: (text, True), raising=False)
        yield


@pytest.fixture(scope='session')
def demo_config() -> Path:
    """The demo detector's own config: no key of ours in it."""
    return DEMO / 'mask_rcnn_swin_demo.py'


@pytest.fixture(scope='session')
def quantization_config() -> Path:
    """The demo detector with our 8-bit base."""
    return DEMO / 'mask_rcnn_swin_demo_w8a8.py'


@pytest.fixture(scope='session')
def demo_checkpoint() -> Path:
    """The trained weights of the demo detector."""
    return DEMO / 'mask_rcnn_swin_demo.pth'


@pytest.fixture(scope='session')
def small_config(tmp_path_factory, quantization_config) -> Path:
    """The demo detector with our 8-bit base on a far narrower Swin of four blocks."""
    from small_models import SMALL
    path = tmp_path_factory.mktemp('small') / 'small_w8a8.py'
    path.write_text(f"_base_ = '{quantization_config}'\nmodel = {SMALL!r}\n")
    return path


@pytest.fixture(scope='session')
def small_checkpoint(small_config, demo_checkpoint) -> Path:
    """Random weights for it, where none that were trained are needed."""
    from small_models import detector
    torch.manual_seed(0)
    meta = torch.load(demo_checkpoint, weights_only=True)['meta']
    path = small_config.with_suffix('.pth')
    torch.save(dict(state_dict=detector().state_dict(), meta=meta), path)
    return path


@pytest.fixture(scope='session')
def quantized_demo(tmp_path_factory, quantization_config, demo_checkpoint) -> Path:
    """The demo detector's quantized.pth, of two images that took one step each."""
    folder = tmp_path_factory.mktemp('quantized_demo')
    done, = run_scripts(
        folder, '-m', 'psaq_mm', 'quantize', quantization_config, demo_checkpoint, '--work-dir',
        folder, '--device', 'cpu', '--sensitivity-images', 0, '--cfg-options',
        'synthesis.num_images=2', 'synthesis.steps=1', 'quantization.weight.rounding=nearest',
        'log_level=WARNING')
    assert done.returncode == 0, done.stdout
    return folder / 'quantized.pth'


@pytest.fixture(scope='session')
def float_demo(demo_config, demo_checkpoint):
    """The demo detector in float, in evaluation mode."""
    from psaq_mm.engine import init_model
    return init_model(str(demo_config), str(demo_checkpoint))


@pytest.fixture(scope='session')
def whole_graphs(tmp_path_factory, float_demo) -> dict:
    """The demo detector in float as a graph for images of all sizes: engine to file."""
    from psaq_mm.deploy import export_graphs
    files = {}
    for target, engine in (('onnx', 'onnxruntime'), ('openvino', 'openvino')):
        pytest.importorskip('onnx')
        pytest.importorskip(engine)
        folder = tmp_path_factory.mktemp(f'whole_{target}')
        found = export_graphs(float_demo, folder, target, part='model', check_size=(96, 128))
        assert found['graphs'][0]['agreement']['share'] == 1
        files[engine] = folder / found['graphs'][0]['file']
    return files


@pytest.fixture(scope='session')
def photos(tmp_path_factory, scenes) -> Path:
    """A folder of two scenes, 0.png and 1.png."""
    folder = tmp_path_factory.mktemp('photos')
    for i in range(2):
        cv2.imwrite(str(folder / f'{i}.png'), scenes.render(1_000_000 + i)[0])
    return folder


@pytest.fixture(scope='session')
def scenes() -> ModuleType:
    """The generator of the demo's scenes."""
    return load_script(DEMO / 'scenes.py')


def load_script(path: Path) -> ModuleType:
    """Import a script that lies outside of the package."""
    name = f'psaq_mm_script_{path.parent.name}_{path.stem}'
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def single_stage(name, folder):
    """Config of a small single-stage detector on a Swin, as docs/your_own_model.md says."""
    backbone = dict(type='SwinTransformer', _delete_=True, embed_dims=12, depths=(1, 1, 1, 1),
                    num_heads=(1, 2, 2, 2), out_indices=(1, 2, 3))
    norm = ", norm_cfg=dict(type='GN', num_groups=4)" if name == 'fcos' else ''
    config = folder / f'{name}.py'
    config.write_text(
        f"_base_ = ['mmdet::{SINGLE_STAGE[name]}', '{ROOT}/configs/_base_/w8a8.py']\n"
        f'model = dict(backbone={backbone!r}, neck=dict(in_channels=[24, 48, 96], '
        'out_channels=16, start_level=0), bbox_head=dict(in_channels=16, feat_channels=16, '
        f'num_classes=5{norm}))\n')
    return config


def plain_student(model, images=None, **changes):
    """A student by naive ranges and rounding at 8 bits, but for some settings; calibrated if
    there are images."""
    from psaq_mm import QuantizationSettings, calibrate, prepare
    from psaq_mm.recipe.merging import merged
    plain = dict(weight=dict(rounding='nearest'), activation=dict(margin=0.), roles={},
                 overrides={}, channel_limit=None)
    student = prepare(model, QuantizationSettings.from_dict(merged(plain, changes)))
    return student if images is None else calibrate(student, images)


def calibrated_op(op, x):
    """Set the ranges of a quantized op: those of its weight, and of the rest on its input."""
    activations = [q for role, q in op.quantizers.items() if role != 'weight']
    for quantizer in activations:
        quantizer.start_observing()
    with torch.no_grad():
        op(x)
    for quantizer in activations:
        quantizer.finish_observing()
    op.set_weight_range()
    return op


@pytest.fixture
def call_tool(monkeypatch, capsys):
    """Call a tool as the shell would; returns exit status, stdout, stderr. A quantization has
    no page and no sensitivity, which take time, unless a test looks at them."""

    def call(name: str, *arguments: object, page: bool = False):
        if name == 'quantize' and not page:
            from psaq_mm.engine.hooks import report_hook
            monkeypatch.setattr(report_hook, 'report_page', lambda *args: '')
            monkeypatch.setattr(report_hook, 'measure_each_alone', lambda *args: {})
        module = load_script(ROOT / 'tools' / f'{name}.py')
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            from psaq_mm.engine.command_line import run_tool
            run_tool(module.main)
        except SystemExit as exit_:
            status = exit_.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)

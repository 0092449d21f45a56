# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Loaders that know nothing of quantization stop; none leaves random weights in a model."""
import collections
import copy
import pickle
import subprocess
import sys

import mmdet.apis
import mmengine
import mmseg.apis
import pytest
import torch
from conftest import DEMO
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from psaq_mm.checkpoint import (
    STATE_KEY,
    load_checkpoint_file,
    load_quantized_state,
    quantized_checkpoint,
    save_torch,
)
from psaq_mm.checkpoint.stock_loader_guard import StockLoaderGuard
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.errors import UserError
from psaq_mm.ops import apply_plan
from psaq_mm.quantization import QuantSpec

SAYS = r"psaq_mm\.init_model\(config, path\) or psaq_mm\.load\(float_model, path\);\n.*" \
    r"custom_hooks = \[dict\(type='psaq_mm.QuantizedCheckpointHook'\)\]"
CONFIGS = dict(detector=DEMO / 'mask_rcnn_swin_demo.py', segmentor=DEMO / 'upernet_swin_demo.py')


def save_quantized(model, names, path):
    """With weights of 8 bits in a few layers."""
    spec = QuantSpec(granularity='per_channel')
    apply_plan(model, {name: dict(weight=spec) for name in names})
    for name in names:
        op = model.get_submodule(name)
        top = op.weight.detach().flatten(1).abs().max(1).values
        op.weight_quantizer.set_range(-top, top)
    save_torch(quantized_checkpoint(model, meta=dict(dataset_meta=dict(
        classes=['a', 'b', 'c'], palette=[[0, 0, 0]] * 3))), path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Quantized checkpoints of the demo models."""
    folder = tmp_path_factory.mktemp('files')
    for name, config in CONFIGS.items():
        save_quantized(build_float_model(load_config(config)),
                       ['backbone.patch_embed.projection'], folder / f'{name}.pth')
    return folder


@pytest.mark.parametrize('loads', [
    lambda config, path: mmdet.apis.init_detector(str(config), str(path), device='cpu'),
    lambda config, path: mmdet.apis.DetInferencer(str(config), str(path), device='cpu'),
], ids=['init_detector', 'DetInferencer'])
def test_stock_detection(loads, files):
    with pytest.raises(UserError, match=SAYS):
        loads(CONFIGS['detector'], files / 'detector.pth')


@pytest.mark.parametrize('loads', [
    lambda config, path: mmseg.apis.init_model(str(config), str(path), device='cpu'),
    lambda config, path: mmseg.apis.MMSegInferencer(str(config), str(path), device='cpu'),
], ids=['init_model', 'MMSegInferencer'])
def test_stock_segmentation(loads, files):
    with pytest.raises(UserError, match=SAYS):
        loads(CONFIGS['segmentor'], files / 'segmentor.pth')


def test_stock_runner(files, tmp_path):
    config = mmengine.Config.fromfile(CONFIGS['detector'])
    runner = Runner(model=config.model, work_dir=tmp_path, default_scope='mmdet',
                    experiment_name='test_stock_runner')
    before = copy.deepcopy(runner.model.state_dict())
    with pytest.raises(UserError, match=SAYS):
        runner.load_checkpoint(str(files / 'detector.pth'))
    for key, value in runner.model.state_dict().items():
        assert torch.equal(value, before[key])


def test_stock_functions(files):
    path = str(files / 'detector.pth')
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match=SAYS):
        load_checkpoint(model, path)
    checkpoint = torch.load(path, weights_only=False)
    with pytest.raises(UserError, match=SAYS):
        model.load_state_dict(checkpoint['state_dict'], strict=False)
    with pytest.raises(UserError, match=SAYS):  # as timm does
        {k.replace('module.', ''): v for k, v in checkpoint['state_dict'].items()}


def test_pretrained_backbone(files):
    """init_cfg of a backbone reads a part of the state dict."""
    from mmengine.model import BaseModule

    class Model(BaseModule):
        pass

    model = Model(dict(type='Pretrained', checkpoint=str(files / 'detector.pth')))
    with pytest.raises(UserError, match=SAYS):
        model.init_weights()
    model = Model(dict(type='Pretrained', checkpoint=str(files / 'detector.pth'),
                       prefix='backbone.'))
    with pytest.raises(UserError, match=SAYS):
        model.init_weights()


def test_process_that_has_not_imported_psaq_mm(files):
    code = (f"from mmengine.runner import load_checkpoint\nfrom torch import nn\n"
            f"load_checkpoint(nn.Linear(2, 2), {str(files / 'detector.pth')!r})")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'psaq_mm.init_model(config, path)' in done.stderr or 'StockLoaderGuard' in done.stderr


@pytest.mark.skipif(not hasattr(torch.serialization, 'add_safe_globals'),
                    reason='torch before 2.4')
def test_weights_only(files):
    """What torch has as the default since 2.6."""
    ours = load_checkpoint_file(files / 'detector.pth')
    loaded = torch.load(files / 'detector.pth', weights_only=True)
    assert type(loaded['state_dict']) is type(ours['state_dict']) is StockLoaderGuard
    assert loaded[STATE_KEY].keys() == ours[STATE_KEY].keys()
    for key, value in loaded[STATE_KEY].items():
        assert torch.equal(value, ours[STATE_KEY][key])


USES = {
    'items': lambda g: g.items(), 'keys': lambda g: g.keys(), 'values': lambda g: g.values(),
    'iteration': list, 'item': lambda g: g['a'], 'get': lambda g: g.get('a'), 'len': len,
    'truth': bool, 'in': lambda g: 'a' in g, 'copy': lambda g: g.copy(), 'dict': dict,
    'unpacked': lambda g: {**g}, 'keywords': lambda g: dict(**g), 'pop': lambda g: g.pop('a'),
    'popitem': lambda g: g.popitem(), 'ordered': collections.OrderedDict,
    'set': lambda g: g.__setitem__('a', 1), 'delete': lambda g: g.__delitem__('a'),
    'update': lambda g: g.update(a=1), 'setdefault': lambda g: g.setdefault('a', 1),
    'clear': lambda g: g.clear(), 'updated with it': lambda g: {}.update(g),
    'reversed': lambda g: reversed(g), 'sorted': sorted,
}


@pytest.mark.parametrize('use', USES.values(), ids=list(USES))
def test_any_use(use):
    with pytest.raises(UserError, match=SAYS):
        use(StockLoaderGuard())


def test_copies_and_pickles():
    guard = StockLoaderGuard()
    for other in (copy.copy(guard), copy.deepcopy({'a': guard})['a'],
                  pickle.loads(pickle.dumps(guard))):
        assert type(other) is StockLoaderGuard
    assert repr({'state_dict': guard}) == "{'state_dict': StockLoaderGuard()}"
    assert isinstance(guard, dict)
    assert len(pickle.dumps(guard, 2)) < 80


def test_our_own_loading(files):
    model = build_float_model(load_config(CONFIGS['detector']))
    load_quantized_state(model, load_checkpoint_file(files / 'detector.pth'), 'detector.pth')
    assert type(model.backbone.patch_embed.projection).__name__ == 'QuantConv2d'

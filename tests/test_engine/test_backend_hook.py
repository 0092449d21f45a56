# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""An engine is put into the runner's model while that is still in train mode."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO
from mmengine.logging import MMLogger

from psaq_mm.deploy import export_graphs
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.engine.hooks import BackendHook

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.mark.parametrize('name', ['upernet_swin', 'mask_rcnn_swin'])
def test_train_mode(tmp_path, name):
    """mmengine calls ``before_test`` before ``model.eval()``."""
    model = build_float_model(load_config(DEMO / f'{name}_demo.py'))
    model.load_state_dict(torch.load(DEMO / f'{name}_demo.pth', weights_only=True)['state_dict'])
    expected = export_graphs(model.eval(), tmp_path / 'eval', 'onnx')['graphs'][0]['parity']
    model.train()
    norms = {k: v.clone() for k, v in model.state_dict().items() if 'running' in k}
    hook = BackendHook('onnxruntime', 'demo.pth', 'ab')
    hook.before_test(SimpleNamespace(model=model, work_dir=tmp_path,
                                     logger=MMLogger.get_current_instance()))
    manifest = json.loads((tmp_path / 'export_onnx' / 'export.json').read_text())
    assert manifest['graphs'][0]['parity'] == expected
    assert all(row['sqnr_db'] > 80 for row in expected['outputs'])
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in norms.items() if k in state)
    assert model.training and hook.description.startswith('onnxruntime')

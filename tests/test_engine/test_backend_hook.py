# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""An engine is put into the runner's model while that is still in train mode."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement as DataSample

from psaq_mm.deploy import Graphs
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.engine.graph_model import GraphModel
from psaq_mm.engine.hooks import BackendHook

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.mark.parametrize('name', ['upernet_swin', 'mask_rcnn_swin'])
def test_train_mode(tmp_path, name):
    """mmengine calls ``before_test`` before ``model.eval()``. A graph takes the model's place."""
    config = load_config(DEMO / f'{name}_demo.py')
    model = build_float_model(config)
    model.load_state_dict(torch.load(DEMO / f'{name}_demo.pth', weights_only=True)['state_dict'])
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hook = BackendHook('onnxruntime', 'demo.pth', 'ab')
    runner = SimpleNamespace(model=model, work_dir=tmp_path, cfg=config,
                             logger=MMLogger.get_current_instance())
    hook.before_test(runner)
    manifest = json.loads((tmp_path / 'test_export_onnx' / 'export.json').read_text())
    assert manifest['part'] == 'model' and manifest['graphs'][0]['agreement']['share'] > 0.999
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and hook.description.startswith('onnxruntime')
    assert isinstance(runner.model, GraphModel) and not list(runner.model.parameters())
    images = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    sample = DataSample(metainfo=dict(ori_shape=(48, 64)))
    found = runner.model.test_step(dict(inputs=[images], data_samples=[sample]))[0]
    if name == 'upernet_swin':
        assert found.pred_sem_seg.data.shape == (1, 48, 64)
    else:
        assert found.pred_instances.masks.shape[1:] == (48, 64)
        assert (found.pred_instances.bboxes <= torch.tensor([64., 48., 64., 48.])).all()


def test_images_that_the_pipeline_pads(whole_graphs, float_demo, scenes):
    """Boxes and masks are those of mmdet, which divides by the scale factor."""
    init_default_scope('mmdet')  # a test before may have run a segmentor
    pixels = scenes.render(1_000_000)[0]
    images = torch.full((3, 320, 288), 114, dtype=torch.uint8)
    images[:, :224, :224] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    meta = dict(ori_shape=(112, 112), img_shape=(320, 288), scale_factor=(2., 2.))
    model = GraphModel(Graphs(whole_graphs['onnxruntime'].parent, 'onnxruntime'))
    found, expected = (of.test_step(dict(inputs=[images], data_samples=[
        DetDataSample(metainfo=meta)]))[0].pred_instances for of in (model, float_demo))
    assert len(found) == len(expected) > 5
    assert torch.allclose(found.bboxes, expected.bboxes, atol=1e-3)
    assert (found.masks != expected.masks).float().mean() < 1e-5

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whole segmentors and classifiers: the classes that the hosts find."""
import copy

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO

from psaq_mm.deploy import ExportError, export_graphs
from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.engine import init_model
from psaq_mm.errors import UserError
from psaq_mm.runtime import Model

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


def exported(name, folder, **options):
    model = init_model(str(DEMO / f'{name}_demo.py'), str(DEMO / f'{name}_demo.pth'))
    manifest = export_graphs(model, folder, 'onnx', part='model', check_size=(96, 128), **options)
    return model, Model(folder / manifest['graphs'][0]['file'], threads=1), manifest


def test_segmentor(tmp_path, scenes):
    """Of images that are resized and padded, and of one as it is."""
    from mmseg.apis import inference_model
    model, runtime, manifest = exported('upernet_swin', tmp_path)
    assert manifest['graphs'][0]['agreement']['share'] > 0.999
    pixels = scenes.render(1_000_000)[0]
    for image in (pixels, cv2.resize(pixels, (150, 201)), pixels[:100]):
        with torch.no_grad():
            expected = inference_model(model, image).pred_sem_seg.data[0].numpy()
        found = runtime(image)
        assert found.labels.shape == image.shape[:2]
        assert (found.labels != expected).mean() < 1e-3
        assert len(np.unique(found.labels)) > 2
        assert found.draw().shape == image.shape
        assert sum(found.plain()['pixels'].values()) == pytest.approx(1, abs=1e-3)


def test_align_corners(tmp_path):
    """The runtime resizes logits as torch does."""
    from psaq_mm.runtime.model import _resized
    plane = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    for corners in (False, True):
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(plane)[None, None], (20, 13), mode='bilinear', align_corners=corners)
        assert np.allclose(_resized(plane, (20, 13), corners), expected[0, 0].numpy(), atol=1e-5)


def test_classifier(tmp_path, scenes):
    """Logits of an image of the model's size; its file says how others are resized."""
    model, runtime, _ = exported('swin', tmp_path)
    height, width = runtime.info['size']
    pixels = scenes.render(1_000_000)[0][:height, :width].copy()
    rgb = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)
    with torch.no_grad():
        expected = model.test_step(dict(inputs=[rgb], data_samples=[0]))[0]['logits']
    runtime.resize = False
    found = runtime(pixels)
    assert np.allclose(found.scores, expected.softmax(0).numpy(), atol=1e-5)
    top = found.plain()['top']
    assert len(top) == 5 and top[0]['label'] == int(expected.argmax())
    assert found.draw().shape == pixels.shape
    assert runtime.info['resize']['mode'] == 'crop'


def test_segmentors_that_cannot_be_exported():
    model = init_model(str(DEMO / 'upernet_swin_demo.py'), str(DEMO / 'upernet_swin_demo.pth'))
    sliding = copy.copy(model)
    sliding.test_cfg = copy.deepcopy(model.test_cfg)
    sliding.test_cfg.mode = 'slide'
    with pytest.raises(UserError, match='mode slide.*--part features'):
        find_subgraph(sliding, 'model')
    forward = model.decode_head.forward
    model.decode_head.forward = lambda features, samples: forward(features)
    with pytest.raises(UserError, match='UPerHead.*more than features.*--part features'):
        find_subgraph(model, 'model')
    with pytest.raises(UserError, match='SwinTransformer.*no results.*--part features'):
        find_subgraph(model.backbone, 'model')


def test_an_engine_that_decides_otherwise(tmp_path, monkeypatch):
    """An error, after all files are written."""
    from psaq_mm.runtime.engines import ONNXRuntimeEngine
    run = ONNXRuntimeEngine.run
    monkeypatch.setattr(ONNXRuntimeEngine, 'run', lambda self, images: [
        np.roll(output, 1, axis=1) for output in run(self, images)])
    with pytest.raises(ExportError, match=r'model_\d+x\d+.onnx: the engine decides otherwise'):
        exported('swin', tmp_path)
    assert (tmp_path / 'export.json').exists() and list(tmp_path.glob('*.onnx'))


@pytest.mark.parametrize('padding', [dict(size_divisor=64), dict(size=(160, 224))])
def test_a_segmentor_whose_preprocessor_pads(tmp_path, scenes, padding):
    """mmseg resizes logits to the padded size, and then cuts the padding off."""
    from mmseg.apis import inference_model
    model = init_model(str(DEMO / 'upernet_swin_demo.py'), str(DEMO / 'upernet_swin_demo.pth'))
    model.data_preprocessor.test_cfg = padding
    manifest = export_graphs(model, tmp_path, 'onnx', part='model', check_size=(96, 128))
    assert manifest['graphs'][0]['agreement']['share'] > 0.999
    runtime = Model(tmp_path / manifest['graphs'][0]['file'], threads=1)
    pixels = scenes.render(1_000_000)[0]
    for image in (pixels, cv2.resize(pixels, (150, 201)), pixels[:100]):
        with torch.no_grad():
            expected = inference_model(model, image).pred_sem_seg.data[0].numpy()
        assert (runtime(image).labels != expected).mean() < 1e-3

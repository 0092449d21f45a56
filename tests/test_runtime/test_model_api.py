# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A client that we did not write reads our files: OpenVINO's Model API."""
import numpy as np
import pytest
import torch
from conftest import single_stage

from psaq_mm.deploy import export_graphs
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.runtime import Model

pytest.importorskip('onnx')
openvino = pytest.importorskip('openvino')
models = pytest.importorskip('model_api.models', reason='openvino-model-api is not installed')
adapters = pytest.importorskip('model_api.adapters')


def client_of(file):
    """The Model API's model. In float32: a CPU with bfloat16 would use that."""
    return models.Model.create_model(adapters.OpenvinoAdapter(
        openvino.Core(), str(file), device='CPU',
        plugin_config={'INFERENCE_PRECISION_HINT': 'f32'}))


def test_boxes(tmp_path):
    """A detector without masks."""
    model = build_float_model(load_config(single_stage('retinanet', tmp_path)))
    with torch.no_grad():
        model.bbox_head.retina_cls.bias.add_(torch.randn_like(model.bbox_head.retina_cls.bias) + 3)
    model.dataset_meta = dict(classes=['a b', 'c', 'd', 'e', 'f'])
    export_graphs(model, tmp_path, 'openvino', [(64, 96)], part='model')
    file = tmp_path / 'model_64x96.xml'
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    own = Model(file, resize=False)(pixels)
    got = client_of(file)(pixels)
    sides = own.boxes[:, 2:] - own.boxes[:, :2]
    keep = np.prod(sides.round(), axis=1) > 4
    assert keep.sum() > 3
    found = {(int(label), *map(int, box)) for label, box in zip(got.labels, got.bboxes)}
    expected = {(int(label), *map(int, box)) for label, box in zip(
        own.labels[keep], own.boxes[keep].round())}
    assert len(found & expected) > 0.9 * len(expected)
    assert got.label_names[0] in ('a_b', 'c', 'd', 'e', 'f')


def test_instance_segmentation(tmp_path, float_demo, scenes):
    """The same boxes, labels, names and scores; masks but for how they are pasted."""
    pixels = scenes.render(1_000_000)[0]
    export_graphs(float_demo, tmp_path, 'openvino', [(224, 224)], part='model')
    file = tmp_path / 'model_224x224.xml'
    client = client_of(file)
    assert type(client).__name__ == 'MaskRCNNModel'
    got, own = client(pixels), Model(file)(pixels)
    sides = own.boxes.round()
    keep = np.prod(sides[:, 2:] - sides[:, :2], axis=1) > 1
    assert np.abs(got.bboxes - own.boxes[keep]).max() <= 0.5 + 1e-3
    assert np.array_equal(got.labels - 1, own.labels[keep])
    assert got.label_names == [own.name_of(label) for label in own.labels[keep]]
    assert np.allclose(got.scores, own.scores[keep], atol=1e-4)
    sure = own.scores[keep] > 0.5
    common = (got.masks.astype(bool) & own.masks[keep]).sum((1, 2))[sure]
    union = (got.masks.astype(bool) | own.masks[keep]).sum((1, 2))[sure]
    assert (common / union).mean() > 0.9

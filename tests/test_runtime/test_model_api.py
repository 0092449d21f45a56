# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A client that we did not write reads our files: OpenVINO's Model API."""
import numpy as np
import pytest

from psaq_mm.deploy import export_graphs
from psaq_mm.runtime import Model

pytest.importorskip('onnx')
openvino = pytest.importorskip('openvino')
models = pytest.importorskip('model_api.models', reason='openvino-model-api is not installed')
adapters = pytest.importorskip('model_api.adapters')


def test_instance_segmentation(tmp_path, float_demo, scenes):
    """The same boxes, labels, names and scores; masks but for how they are pasted."""
    pixels = scenes.render(1_000_000)[0]
    export_graphs(float_demo, tmp_path, 'openvino', [(224, 224)], part='model')
    file = tmp_path / 'model_224x224.xml'
    # In float32: a CPU with bfloat16 would use that.
    adapter = adapters.OpenvinoAdapter(openvino.Core(), str(file), device='CPU', plugin_config={
        'INFERENCE_PRECISION_HINT': 'f32'})
    client = models.Model.create_model(adapter)
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

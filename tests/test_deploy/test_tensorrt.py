# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""ONNX as TensorRT wants it: zero points of 0, and convolutions that it knows."""
import pytest
from conftest import ROOT
from demo_models import demo_model

from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.deploy.onnx_export import trace, zero_points
from psaq_mm.engine import load_config, read_recipe
from psaq_mm.errors import UserError

onnx = pytest.importorskip('onnx')


def test_zero_points(tmp_path):
    """The whole detector by the shipped base config: quantizers before every product."""
    config = tmp_path / 'detector_tensorrt.py'
    config.write_text(f"_base_ = ['{ROOT}/demo/mask_rcnn_swin_demo.py', "
                      f"'{ROOT}/configs/_base_/tensorrt.py']\n")
    settings = read_recipe(load_config(config)).quantization
    assert settings.activation.symmetric and settings.weight.symmetric
    model = demo_model('mask_rcnn_swin', scope='model', activation=dict(symmetric=True))
    graph = trace(find_subgraph(model, 'model'), (64, 64), 'tensorrt')
    onnx.checker.check_model(graph, full_check=True)
    found = zero_points(graph)
    assert len(found) > 100 and not any(values.any() for values in found.values())
    kinds = [node.op_type for node in graph.graph.node]
    assert 'Scan' not in kinds and kinds.count('Conv') > 10
    assert {node.domain for node in graph.graph.node} == {''}
    makers = {name: node.op_type for node in graph.graph.node for name in node.output}
    for node in graph.graph.node:
        if node.op_type in ('Conv', 'ConvTranspose'):
            assert [makers[name] for name in node.input[:2]] == ['DequantizeLinear'] * 2


def test_asymmetric_activations_are_refused():
    model = demo_model('mask_rcnn_swin')
    with pytest.raises(UserError, match='zero point.*tensorrt.py'):
        trace(find_subgraph(model, 'features'), (64, 64), 'tensorrt')

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Files that engines run: their numbers, and what they compute."""
import hashlib

import numpy as np
import pytest
import torch
from conftest import calibrated_op
from demo_models import demo_model
from torch import nn

from psaq_mm.adapters import find_adapter
from psaq_mm.deploy import Graphs, export_graphs, read_export
from psaq_mm.deploy.export import choose_sizes
from psaq_mm.deploy.export_manifest import write_export
from psaq_mm.deploy.exportable_quantizer import ExportableWeight
from psaq_mm.deploy.graph_ops import OPSET
from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.deploy.onnx_export import pack_small_weights
from psaq_mm.deploy.parity import lowest_sqnr, parity_images
from psaq_mm.errors import UserError
from psaq_mm.ops import QuantConv2d, QuantLinear, named_quant_ops
from psaq_mm.quantization import QuantSpec, sqnr_db

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')

SIZE = (96, 128)
TARGETS = [('onnx', 'onnxruntime'), ('openvino', 'openvino')]


def lowest(manifest):
    return min(lowest_sqnr(g['parity']['outputs']) or 200 for g in manifest['graphs'])


def run_both(model, graphs, size, batch=1):
    images = parity_images(size, *find_adapter(model).valid_range(model), batch=batch, seed=3)
    with torch.no_grad():
        expected = find_subgraph(model).run(images)
    return min(sqnr_db(a, b) for a, b in zip(expected, graphs(images)))


@pytest.mark.parametrize('target, backend', TARGETS)
def test_detector(tmp_path, target, backend):
    """Two fixed sizes, one of them padded; images go in one by one."""
    model = demo_model('mask_rcnn_swin', scope='backbone')
    manifest = export_graphs(model, tmp_path, target, [SIZE, (112, 112)], about=dict(sha256='ab'))
    assert read_export(tmp_path) == {**manifest, 'sha256': read_export(tmp_path)['sha256']}
    assert manifest['output_names'] == [f'{kind}_{i}' for kind in ('feature', 'scores', 'deltas')
                                        for i in range(5)]
    assert lowest(manifest) > 35
    graphs = Graphs(tmp_path, backend, threads=1, sha256='ab')
    assert run_both(model, graphs, SIZE, batch=2) > 35
    assert run_both(model, graphs, (112, 112)) > 35
    assert backend in graphs.describe() and '1 thread' in graphs.describe()
    with pytest.raises(UserError, match='64 x 64.*96 x 128, 112 x 112.*--size 64 64'):
        graphs(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match='another checkpoint'):
        Graphs(tmp_path, backend, sha256='cd')


@pytest.mark.parametrize('name, target, backend, scope', [
    ('mask_rcnn_swin', 'onnx', 'onnxruntime', 'backbone'),
    ('mask_rcnn_swin', 'openvino', 'openvino', 'backbone'),
    ('mask_rcnn_swin', 'onnx', 'onnxruntime', 'model'),
    ('upernet_swin', 'onnx', 'onnxruntime', 'backbone')])
def test_any_size(tmp_path, name, target, backend, scope):
    """One graph takes images of all sizes."""
    model = demo_model(name, scope=scope)
    export_graphs(model, tmp_path, target, check_size=SIZE)
    graphs = Graphs(tmp_path, backend, threads=1)
    for size in (SIZE, (75, 101)):
        assert run_both(model, graphs, size) > 33, size


@pytest.mark.parametrize('target, backend', TARGETS)
@pytest.mark.parametrize('name', ['swin', 'deit'])
def test_classifiers(tmp_path, target, backend, name):
    model = demo_model(name, scope='model')
    assert lowest(export_graphs(model, tmp_path, target)) > 35
    images = torch.randn(3, 3, 112, 112)
    with torch.no_grad():
        expected = model(images)
        Graphs(tmp_path, backend).install(model)
        got = model(images)
    assert sqnr_db(expected, got) > 35


@pytest.mark.parametrize('target, backend', TARGETS)
def test_float_model(tmp_path, target, backend):
    model = demo_model('mask_rcnn_swin', quantized=False)
    assert lowest(export_graphs(model, tmp_path, target, [SIZE])) > 80


PER_TOKEN = dict(roles=dict(input=dict(granularity='per_token', rotate=True),
                            attention=dict(granularity='per_token')))


@pytest.mark.parametrize('target, backend', TARGETS)
@pytest.mark.parametrize('name, settings', [
    ('swin', dict(weight=dict(bits=4))), ('deit', dict(weight=dict(bits=4, symmetric=False))),
    ('swin', dict(activation=dict(bits=6))), ('swin', dict(activation=dict(symmetric=True))),
    ('swin', dict(placement='v1')),
    ('swin', PER_TOKEN), ('deit', PER_TOKEN),
    ('upernet_swin', dict(scope='model'))], ids=str)
def test_settings(tmp_path, target, backend, name, settings):
    """Few bits, other types and places, heads too: always the simulated values."""
    model = demo_model(name, **settings)
    sizes = [(64, 64)] if name == 'upernet_swin' else []
    # With steps four times as wide a rounding that falls the other way weighs more.
    assert lowest(export_graphs(model, tmp_path, target, sizes)) > 25


def test_numbers_are_the_checkpoints(tmp_path):
    """Every scale, zero point and integer, and nothing beside them."""
    model = demo_model('mask_rcnn_swin', scope='backbone')
    export_graphs(model, tmp_path, 'onnx', [SIZE])
    graph = onnx.load(str(tmp_path / 'model_96x128.onnx')).graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    written = {(float(values[n.input[1]]), int(values[n.input[2]])) for n in graph.node
               if n.op_type == 'QuantizeLinear'}
    expected, weights = set(), {}
    for name, op in named_quant_ops(model):
        for role, quantizer in op.quantizers.items():
            if role == 'weight':
                weights[name] = (quantizer.to_integers(op.weight).numpy(), quantizer.scale.numpy())
            else:
                expected.add((float(quantizer.scale), int(quantizer.zero_point)))
    assert written == expected
    found = {n.input[0]: (values[n.input[0]], values[n.input[1]]) for n in graph.node
             if n.op_type == 'DequantizeLinear' and n.input[0] in values}
    for integers, _ in found.values():
        assert integers.dtype == np.int8
    key = 'backbone.stages.0.blocks.0.host.ffn.layers.1.quantizers.weight.integers'
    integers, scale = weights['backbone.stages.0.blocks.0.ffn.layers.1']
    assert np.array_equal(found[key][0], integers.T) and np.array_equal(found[key][1], scale)
    parts = [found[f'backbone.stages.0.blocks.0.attention.{x}.quantizers.weight.integers']
             for x in 'qkv']
    integers, scale = weights['backbone.stages.0.blocks.0.attn.w_msa.qkv']
    assert np.array_equal(np.concatenate([p[0] for p in parts], 1), integers.T)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), scale)


@pytest.mark.parametrize('settings', [{}, dict(weight=dict(bits=4)),
                                      dict(weight=dict(bits=3), **PER_TOKEN)], ids=str)
def test_layers_multiply_integers(tmp_path, settings):
    """All quantized layers of a whole model do in onnxruntime."""
    import onnxruntime
    model = demo_model('upernet_swin', scope='model', **settings)
    manifest = export_graphs(model, tmp_path, 'onnx', [SIZE])
    assert lowest(manifest) > 30
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / 'optimized.onnx')
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / 'model_96x128.onnx'), options)
    nodes = list(onnx.load(str(tmp_path / 'optimized.onnx')).graph.node)
    nodes += [n for scan in nodes if scan.op_type == 'Scan'  # the rows of a convolution
              for a in scan.attribute if a.name == 'body' for n in a.g.node]
    kinds = [n.op_type for n in nodes]
    layers = [name for name, op in named_quant_ops(model) if 'weight' in op.quantizers
              and not name.startswith('auxiliary')]
    blocks = sum(len(stage.blocks) for stage in model.backbone.stages)
    # Query, key and value are three layers. Of the two products of attention the second has a
    # quantized output, but for sizes of tokens between.
    products = blocks * (2 if 'roles' in settings else 1)
    assert kinds.count('MatMulIntegerToFloat') == len(layers) + 2 * blocks + products
    assert 'Conv' not in kinds and 'MatMulNBits' not in kinds


@pytest.mark.parametrize('target, backend', TARGETS)
@pytest.mark.parametrize('bits', [4, 8])
def test_inputs_of_weights_alone_stay_float(tmp_path, target, backend, bits):
    """Engines would round them to 8 bits, unasked; of OpenVINO's files other clients too."""
    model = demo_model('swin', weight=dict(bits=bits))
    for _, op in named_quant_ops(model):
        for role, quantizer in op.quantizers.items():
            quantizer.enabled = role == 'weight'
    assert lowest(export_graphs(model, tmp_path, target)) > 90
    if target == 'openvino':
        import openvino
        images = torch.randn(1, 3, 112, 112)
        with torch.no_grad():
            expected = find_subgraph(model).run(images)
        graph = openvino.Core().compile_model(next(tmp_path.glob('*.xml')), 'CPU',
                                              {'INFERENCE_PRECISION_HINT': 'f32'})
        assert sqnr_db(expected[0], torch.from_numpy(graph(images.numpy())[0])) > 90


@pytest.mark.parametrize('target, backend', TARGETS)
def test_limits_of_few_integers_are_exact(tmp_path, target, backend):
    """OpenVINO clips to (10 * scale) / scale + 5 here, which is 14.999999, and drops what is
    behind the point."""
    model = demo_model('mask_rcnn_swin', scope='backbone', activation=dict(bits=4))
    for name, op in named_quant_ops(model):
        for role, quantizer in op.quantizers.items():
            quantizer.enabled = role == 'input' and name.endswith('.proj')
            if quantizer.enabled:
                quantizer.restore_range(torch.tensor(0.1711866706609726), torch.tensor(5.),
                                        quantizer.learned)
    assert lowest(export_graphs(model, tmp_path, target, [SIZE], part='features')) > 60


@pytest.mark.parametrize('shape', [(3, 6), (1, 2), (16, 16), (2, 3, 3, 3), (3, 5)])
@pytest.mark.parametrize('symmetric', [True, False])
def test_two_weights_a_byte(shape, symmetric):
    """What engines compute from the bytes, by onnx's own arithmetic."""
    from onnx.reference import ReferenceEvaluator
    specs = dict(weight=QuantSpec(bits=4, symmetric=symmetric))
    if len(shape) == 2:
        op = QuantLinear.from_float(nn.Linear(*shape), specs)
        op = calibrated_op(op, torch.randn(1, shape[0]))
    else:
        op = QuantConv2d.from_float(nn.Conv2d(shape[1], shape[0], shape[2:]), specs)
        op = calibrated_op(op, torch.randn(1, shape[1], 4, 4))
    holder = nn.Sequential(ExportableWeight(op, 'op', as_matrix=len(shape) == 2))
    integers = holder[0].integers.numpy()
    kind = onnx.helper.np_dtype_to_tensor_dtype(integers.dtype)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node('Identity', ['0.integers'], ['y'])], 'graph', [],
        [onnx.helper.make_tensor_value_info('y', kind, integers.shape)],
        [onnx.numpy_helper.from_array(integers, '0.integers')])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', OPSET)])
    pack_small_weights(model, holder)
    onnx.checker.check_model(model, full_check=True)
    stored = [t for t in model.graph.initializer if t.name.endswith(('bytes', 'integers'))]
    assert [onnx.numpy_helper.to_array(t).nbytes for t in stored] == [
        integers.size if integers.size % 2 else integers.size // 2]
    found = ReferenceEvaluator(model).run(None, {})[0]
    assert found.dtype == integers.dtype and np.array_equal(found, integers)


def test_keys_are_transposed_within_the_product(tmp_path):
    openvino = pytest.importorskip('openvino')
    model = demo_model('mask_rcnn_swin')
    export_graphs(model, tmp_path, 'openvino', [SIZE])
    graph = openvino.Core().read_model(str(next(tmp_path.glob('*.xml'))))
    products = [op for op in graph.get_ordered_ops() if op.get_type_name() == 'MatMul'
                and op.input_value(1).get_node().get_type_name() == 'Transpose']
    within = [op for op in products if op.get_attributes()['transpose_b']]
    assert len(within) == sum(len(stage.blocks) for stage in model.backbone.stages)
    for op in products:
        order = list(op.input_value(1).get_node().input_value(1).get_node().get_vector())
        assert order == [0, 2, 1, 3]


def test_four_bits_are_stored_in_four(tmp_path):
    model = demo_model('swin', weight=dict(bits=4))
    size = {}
    for target in ('onnx', 'openvino'):
        suffix = dict(onnx='.onnx', openvino='.bin')[target]  # beside it lies a text, OpenVINO's
        whole = {}
        for bits, one in ((4, model), (8, demo_model('swin'))):
            whole[bits] = export_graphs(one, tmp_path / target, target)['graphs'][0]['bytes']
            size[bits] = next((tmp_path / target).glob(f'*{suffix}')).stat().st_size
        linear = sum(op.weight.numel() for _, op in named_quant_ops(model)
                     if op.weight_quantizer is not None and op.weight_quantizer.spec.bits == 4)
        assert abs(size[8] - size[4] - linear / 2) < 0.02 * size[8] and whole[4] < whole[8]


def test_float_roles(tmp_path):
    """Left out on demand, and recorded."""
    model = demo_model('mask_rcnn_swin', scope='backbone')
    roles = ['query', 'key', 'attention', 'value']
    manifest = export_graphs(model, tmp_path, 'onnx', [SIZE], roles)
    graph = onnx.load(str(tmp_path / 'model_96x128.onnx')).graph
    # an input may be quantized twice, with the same scale
    count = len({n.input[1] for n in graph.node if n.op_type == 'QuantizeLinear'})
    linear = sum('input' in op.quantizers for _, op in named_quant_ops(model))
    assert count == linear and manifest['float_roles'] == sorted(roles)
    assert lowest(manifest) > 20
    with pytest.raises(UserError, match='unknown role'):
        export_graphs(model, tmp_path, 'onnx', [SIZE], ['querry'])


def test_bf16_and_its_absence(tmp_path):
    model = demo_model('swin')
    export_graphs(model, tmp_path / 'a', 'openvino')
    assert run_both(model, Graphs(tmp_path / 'a', 'openvino', 1, 'bf16'), (112, 112)) > 25
    export_graphs(model, tmp_path / 'b', 'onnx')
    with pytest.raises(UserError, match='onnxruntime on a CPU has no bf16'):
        Graphs(tmp_path / 'b', 'onnxruntime', 1, 'bf16')
    with pytest.raises(UserError, match='format onnx'):
        Graphs(tmp_path / 'b', 'openvino')


def test_sizes():
    subgraph = find_subgraph(demo_model('swin', quantized=False))
    assert choose_sizes(subgraph, []) == [(112, 112)]
    with pytest.raises(UserError, match='112 x 112 only'):
        choose_sizes(subgraph, [(224, 224)])
    subgraph = find_subgraph(demo_model('mask_rcnn_swin', quantized=False))
    assert choose_sizes(subgraph, []) == [None]
    assert choose_sizes(subgraph, [(64, 96), (64, 96)]) == [(64, 96)]
    with pytest.raises(UserError, match='positive'):
        choose_sizes(subgraph, [(0, 96)])


def test_a_graph_that_no_engine_can_load(tmp_path):
    """What was written whole need not be a graph."""
    data = b'no graph'
    (tmp_path / 'model.onnx').write_bytes(data)
    write_export(dict(
        format='onnx', source={}, output_names=['logits'], graphs=[dict(
            file='model.onnx', size=None,
            sha256={'model.onnx': hashlib.sha256(data).hexdigest()})]), tmp_path)
    with pytest.raises(UserError, match='cannot load'):
        Graphs(tmp_path, 'onnxruntime')


def test_missing_package(monkeypatch, tmp_path):
    import sys
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(UserError, match=r"onnx is not installed.*'\.\[deploy\]'"):
        export_graphs(demo_model('swin'), tmp_path / 'out', 'onnx')
    assert not (tmp_path / 'out').exists()


def test_interrupted_export(monkeypatch, tmp_path):
    """Graphs that are half new are not taken for those of an older export."""
    (tmp_path / 'export.json').write_text('{}')

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('psaq_mm.deploy.export.trace', interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_graphs(demo_model('swin'), tmp_path, 'onnx')
    with pytest.raises(UserError, match='tools/export.py'):
        Graphs(tmp_path, 'onnxruntime')

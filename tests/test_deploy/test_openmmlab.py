# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which modules of mmdet's models become a graph, and what stands for them."""
import copy

import pytest
import torch
from conftest import plain_student, single_stage
from demo_models import demo_model
from mmcv.ops import DeformConv2d
from mmdet.structures import DetDataSample
from small_detectors import small_detector
from torch import nn

from psaq_mm.adapters import find_adapter
from psaq_mm.deploy import export_graphs
from psaq_mm.deploy.export import choose_sizes
from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.deploy.parity import lowest_sqnr, parity_images
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.errors import UserError

SIZE = (64, 96)


@pytest.fixture(params=['mask_rcnn_swin', 'retinanet', 'fcos', 'small retinanet',
                        'small mask_rcnn', 'small rtmdet'])
def detector(request, tmp_path):
    if request.param.startswith('small '):
        return small_detector(request.param.split()[1], tmp_path)
    if request.param == 'mask_rcnn_swin':
        return demo_model(request.param, quantized=False).eval()
    model = build_float_model(load_config(single_stage(request.param, tmp_path)))
    return model.eval()


def samples():
    meta = dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, batch_input_shape=SIZE,
                scale_factor=(1.0, 1.0))
    return [DetDataSample(metainfo=meta)]


def predict(model, images):
    with torch.no_grad():
        found = model.predict(images, samples())[0].pred_instances
    return found.bboxes, found.scores, found.labels


def test_traced_form_gives_what_the_host_gives(detector):
    subgraph = find_subgraph(detector)
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        expected, got = subgraph.run(images), subgraph.exportable(SIZE)(images)
    names = subgraph.output_names
    assert len(expected) == len(got) == len(names) == len(set(names))
    for name, one, other in zip(names, expected, got):
        assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max())), name


def test_names(detector):
    subgraph = find_subgraph(detector)
    kinds = list(dict.fromkeys(name.rsplit('_', 1)[0] for name in subgraph.output_names))
    if hasattr(detector, 'roi_head'):
        assert subgraph.modules == 'backbone + neck + rpn_head'
        assert kinds == ['feature', 'scores', 'deltas']
    else:
        assert subgraph.modules == 'backbone + neck + bbox_head'
        fcos = type(detector).__name__ == 'FCOS'
        assert kinds == ['scores', 'deltas', *(['centerness'] if fcos else [])]


def test_predictions_with_a_graph_in_place(detector):
    """The host's own post-processing works on what the graph gives."""
    host = copy.deepcopy(detector)
    subgraph = find_subgraph(detector)
    find_subgraph(host).install(copy.deepcopy(subgraph).run)
    images = torch.randn(2, 1, 3, *SIZE)
    for image in images:  # each has its own results
        expected, got = predict(detector, image), predict(host, image)
        # RTMDet's deltas, of random weights, make no boxes; its outputs are compared above.
        assert len(expected[0]) or type(detector).__name__ == 'RTMDet'
        for one, other in zip(expected, got):
            assert torch.equal(one, other)


def test_features_of_other_images(detector):
    images = torch.randn(2, 1, 3, *SIZE)
    run = copy.deepcopy(find_subgraph(detector)).run
    find_subgraph(detector).install(run)
    head = detector.rpn_head if hasattr(detector, 'roi_head') else detector.bbox_head
    with torch.no_grad():
        first = detector.extract_feat(images[0])
        detector.extract_feat(images[1])
    with pytest.raises(RuntimeError, match='features of the last images'):
        head(first)


@pytest.mark.parametrize('forward', [
    lambda features: 1 / 0,
    lambda features: ([f[0] for f in features], list(features)),
    lambda features: (list(features), list(features)[:-1]),
    lambda features: (list(features), )])
def test_heads_of_other_kinds_stay_the_hosts(forward):
    detector = demo_model('mask_rcnn_swin', quantized=False)
    detector.rpn_head.forward = forward
    subgraph = find_subgraph(detector)
    assert subgraph.modules == 'backbone + neck'
    assert list(subgraph.output_names) == [f'feature_{i}' for i in range(5)]
    images = torch.randn(1, 3, *SIZE)
    subgraph.install(copy.deepcopy(subgraph).run)
    assert detector.rpn_head.forward is forward
    with torch.no_grad():
        assert len(detector.extract_feat(images)) == 5


@pytest.mark.parametrize('name, outputs', [
    ('retinanet', ['scores', 'deltas']), ('mask_rcnn', ['feature', 'scores', 'deltas'])])
def test_outputs_are_counted(tmp_path, name, outputs):
    """A ChannelMapper with 3 levels in and 5 out has no ``num_outs`` to read."""
    model = small_detector(name, tmp_path)
    assert not hasattr(model.neck, 'num_outs') and len(model.backbone.out_indices) == 3
    assert list(find_subgraph(model).output_names) == [
        f'{kind}_{level}' for kind in outputs for level in range(5)]


@pytest.mark.parametrize('bits', [8, 4])
def test_convolutions_that_levels_share(tmp_path, bits):
    """Scores and deltas of RTMDet, quantized as a whole."""
    pytest.importorskip('onnxruntime')
    model = small_detector('rtmdet', tmp_path)
    images = parity_images(SIZE, *find_adapter(model).valid_range(model), batch=2)
    model = plain_student(model, images, scope='model', weight=dict(bits=bits))
    found = export_graphs(model, tmp_path / 'graphs', 'onnx', [SIZE])
    rows = found['graphs'][0]['parity']['outputs']
    assert [row['output'] for row in rows] == [f'{k}_{i}' for k in ('scores', 'deltas')
                                               for i in range(3)]
    assert (lowest_sqnr(rows) or 200) > 35


def test_position_embedding_of_one_size(tmp_path):
    """With an absolute position embedding the model accepts one size, and so does the graph."""
    model = small_detector('retinanet', tmp_path, use_abs_pos_embed=True, pretrain_img_size=64)
    nn.init.normal_(model.backbone.absolute_pos_embed)
    subgraph = find_subgraph(model)
    assert subgraph.fixed_size == (64, 64) and choose_sizes(subgraph, []) == [(64, 64)]
    with pytest.raises(UserError, match=r'--size 64 96: the model accepts images of 64 x 64 only'):
        choose_sizes(subgraph, [SIZE])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(subgraph.run(images), subgraph.exportable((64, 64))(images)):
            assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))
    model = small_detector('retinanet', tmp_path, use_abs_pos_embed=True,
                           pretrain_img_size=(64, 96))
    with pytest.raises(UserError, match='position embeddings of 384 patches'):
        choose_sizes(find_subgraph(model), [])


@pytest.mark.parametrize('place, modules, in_torch', [
    ('bbox_head', 'backbone + neck', ('bbox_head', )),
    ('neck', 'backbone', ('neck', 'bbox_head'))])
def test_operators_that_no_engine_knows_stay_in_torch(tmp_path, place, modules, in_torch):
    """As deformable convolutions: the graph ends before them, and predictions go through it."""
    model = small_detector('retinanet', tmp_path)
    images = torch.randn(1, 3, *SIZE)
    expected = predict(model, images)
    getattr(model, place).add_module('deformable', DeformConv2d(4, 4, 3))
    subgraph = find_subgraph(model)
    assert (subgraph.modules, subgraph.in_torch) == (modules, in_torch)
    with pytest.raises(UserError, match='no engine knows an operator .*--part features'):
        find_subgraph(model, 'model')
    graph = subgraph.exportable(SIZE)
    assert len(subgraph.output_names) == len(graph(images))
    subgraph.install(graph)
    for one, other in zip(expected, predict(model, images)):
        assert torch.allclose(one.float(), other.float(), atol=1e-3)


def test_decode_heads_that_need_queries_stay_the_hosts():
    """As Mask2Former's in mmseg, which asks for samples beside features."""
    segmentor = demo_model('upernet_swin', quantized=False)
    forward = segmentor.decode_head.forward
    segmentor.decode_head.forward = lambda features, samples: forward(features)
    subgraph = find_subgraph(segmentor)
    assert subgraph.modules == 'backbone'
    assert subgraph.output_names == tuple(f'feature_{i}' for i in range(4))

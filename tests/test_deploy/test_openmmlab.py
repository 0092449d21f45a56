# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which modules of mmdet's models become a graph, and what stands for them."""
import copy

import pytest
import torch
from conftest import single_stage
from demo_models import demo_model
from mmdet.structures import DetDataSample

from psaq_mm.deploy.hosts import graph_part
from psaq_mm.engine import build_float_model, load_config

SIZE = (64, 96)


@pytest.fixture(params=['mask_rcnn_swin', 'retinanet', 'fcos'])
def detector(request, tmp_path):
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
    part = graph_part(detector)
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        expected, got = part.run(images), part.export_form(SIZE)(images)
    assert len(expected) == len(got) == len(part.output_names) == len(set(part.output_names))
    for name, one, other in zip(part.output_names, expected, got):
        assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max())), name


def test_names(detector):
    part = graph_part(detector)
    kinds = list(dict.fromkeys(name.rsplit('_', 1)[0] for name in part.output_names))
    if hasattr(detector, 'roi_head'):
        assert part.name == 'backbone + neck + rpn_head'
        assert kinds == ['feature', 'scores', 'deltas']
    else:
        assert part.name == 'backbone + neck + bbox_head'
        fcos = type(detector).__name__ == 'FCOS'
        assert kinds == ['scores', 'deltas', *(['centerness'] if fcos else [])]


def test_predictions_with_a_graph_in_place(detector):
    """The host's own post-processing works on what the graph gives."""
    host = copy.deepcopy(detector)
    part = graph_part(detector)
    graph_part(host).install(copy.deepcopy(part).run)
    images = torch.randn(2, 1, 3, *SIZE)
    for image in images:  # each has its own results
        expected, got = predict(detector, image), predict(host, image)
        assert len(expected[0])
        for one, other in zip(expected, got):
            assert torch.equal(one, other)


def test_features_of_other_images(detector):
    images = torch.randn(2, 1, 3, *SIZE)
    run = copy.deepcopy(graph_part(detector)).run
    graph_part(detector).install(run)
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
    part = graph_part(detector)
    assert part.name == 'backbone + neck'
    assert list(part.output_names) == [f'feature_{i}' for i in range(5)]
    images = torch.randn(1, 3, *SIZE)
    part.install(copy.deepcopy(part).run)
    assert detector.rpn_head.forward is forward
    with torch.no_grad():
        assert len(detector.extract_feat(images)) == 5

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whole detectors in traceable operators: the boxes and masks of mmdet's own predict."""
import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from small_detectors import small_detector
from torch import nn

from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.deploy.onnx_export import save_onnx, trace
from psaq_mm.errors import UserError

SIZES = [(128, 160), (160, 96)]
KINDS = ['faster_rcnn', 'cascade_mask_rcnn', 'retinanet', 'fcos', 'atss', 'rtmdet']


def spread(model):
    """Random heads score all classes alike; spread them, so that some boxes are found."""
    heads = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        for head in heads[-12:]:
            if head.bias is not None:
                head.bias.add_(0.5 * torch.randn_like(head.bias))
    for config in (model.test_cfg, model.test_cfg.get('rcnn') or ConfigDict()):
        if 'score_thr' in config:
            config['score_thr'] = min(config['score_thr'], 0.01)
    return model


def image_of(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = 255 * torch.rand(1, 3, 6, 6, generator=generator)
    return nn.functional.interpolate(small, size=size, mode='bilinear').round()


def matched(one, other):
    """For each of some boxes and labels the place of its equal among others; random heads
    score many boxes so alike that their order means nothing, nor which are the last."""
    if len(one[0]) == 100:
        one, other = ([x[found[0][:, 4] > found[0][-1, 4] + 1e-4] for x in found[:2]]
                      for found in (one, other))
    apart = (one[0][:, None] - other[0][None]).abs()
    equal = (apart[..., :4] < 1e-2).all(2) & (apart[..., 4] < 1e-3) \
        & (one[1][:, None] == other[1][None])
    assert len(one[0]) == len(other[0]) and equal.any(1).all() and equal.any(0).all()
    return equal.int().argmax(1)


def as_boxes(model, images):
    with torch.no_grad():
        return find_subgraph(model, 'model').run(images)


@pytest.mark.parametrize('kind', KINDS)
def test_the_boxes_of_mmdet(tmp_path, kind):
    """The traceable form gives what the host's predict gives, for images of two sizes."""
    model = spread(small_detector(kind, tmp_path))
    exportable = find_subgraph(model, 'model').exportable(None)
    for size in SIZES:
        images = image_of(size)
        boxes, labels = as_boxes(model, images)[:2]
        assert len(boxes) > 2, 'a test of no boxes'
        with torch.no_grad():
            found = exportable(images)
        matched((boxes, labels), found[:2])
        if 'mask' in kind:
            assert found[2].shape == (len(boxes), 28, 28)


@pytest.mark.parametrize('kind', ['retinanet', 'cascade_mask_rcnn'])
def test_the_graph(tmp_path, kind):
    """onnxruntime gives what torch gives."""
    runtime = pytest.importorskip('onnxruntime')
    model = spread(small_detector(kind, tmp_path))
    subgraph = find_subgraph(model, 'model')
    file = tmp_path / 'model.onnx'
    save_onnx(trace(subgraph, None, 'onnx'), file, {})
    session = runtime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    masks = kind.startswith('cascade')
    assert [o.name for o in session.get_outputs()] == ['boxes', 'labels', 'masks'][:2 + masks]
    exportable = subgraph.exportable(None)
    for size in SIZES:
        images = image_of(size)
        with torch.no_grad():
            expected = exportable(images)
        found = [torch.from_numpy(x) for x in session.run(None, {'image': images.numpy()})]
        order = matched(expected, found)
        if masks:
            assert torch.allclose(expected[2][:len(order)], found[2][order], atol=1e-3)


@pytest.mark.parametrize('count', [0, 1, 300])
def test_counts(float_demo, scenes, count):
    """As many objects as there are: none, one, and as many as there may be."""
    model = copy.deepcopy(float_demo)
    images = torch.from_numpy(scenes.render(1_000_000)[0].copy()).permute(2, 0, 1)[None].float()
    scores = as_boxes(model, images)[0][:, 4]
    config = model.roi_head.test_cfg
    config.score_thr = {0: 1., 1: float(scores[:2].mean()), 300: 1e-6}[count]
    config.max_per_img = 300
    expected = as_boxes(model, images)
    assert len(expected[0]) == count
    with torch.no_grad():
        boxes, labels, masks = find_subgraph(model, 'model').exportable((224, 224))(images)
    assert torch.equal(labels, expected[1]) and masks.shape == (count, 28, 28)
    assert torch.allclose(boxes, expected[0], atol=1e-3)


@pytest.mark.parametrize('kind, change, words', [
    ('retinanet', lambda m: m.bbox_head.test_cfg.nms.update(type='soft_nms'), 'RetinaHead.*soft'),
    ('retinanet', lambda m: m.bbox_head.test_cfg.nms.update(max_num=3), 'RetinaHead.*max_num'),
    ('mask_rcnn', lambda m: setattr(m, 'semantic_head', nn.Linear(1, 1)), 'Linear.*all pixels'),
    ('mask_rcnn', lambda m: setattr(m.roi_head, 'mask_head', nn.Identity()), 'Identity.*FCNMask'),
    ('mask_rcnn', lambda m: setattr(m.roi_head.bbox_head, 'with_reg', False), 'no regression'),
    ('retinanet', lambda m: setattr(m, 'bbox_head', nn.Linear(1, 1)), 'Linear.*no BaseDenseHead'),
])
def test_what_cannot_be_exported_is_named(tmp_path, kind, change, words):
    model = copy.deepcopy(small_detector(kind, tmp_path))
    change(model)
    with pytest.raises(UserError, match=words) as error:
        find_subgraph(model, 'model')
    assert '--part features' in str(error.value)


def test_a_loss_with_channels_of_its_own(tmp_path):
    """V3Det's: the loss makes scores of the channels, and no sigmoid follows."""
    model = spread(small_detector('fcos', tmp_path))
    loss = dict(type='FocalCustomLoss', use_sigmoid=True, num_classes=5)
    model.bbox_head.loss_cls = MODELS.build(loss)
    images = image_of(SIZES[0])
    expected = as_boxes(model, images)
    assert len(expected[0]) > 2 and len(expected[1].unique()) > 1
    with torch.no_grad():
        matched(expected, find_subgraph(model, 'model').exportable(None)(images))


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels(tmp_path, channels):
    model = small_detector('retinanet', tmp_path, in_channels=channels)
    model.data_preprocessor = MODELS.build(dict(type='DetDataPreprocessor'))
    with pytest.raises(UserError, match=f'images of {channels} channels.*--part features'):
        find_subgraph(model, 'model')

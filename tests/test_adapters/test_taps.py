# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Where teacher and student are compared: the hosts' own tensors, in groups."""
import copy

import pytest
import timm
import torch
from conftest import DEMO, plain_student, single_stage
from mmdet.structures.bbox import bbox2roi
from torch import nn

import psaq_mm
from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.openmmlab_taps import tap_groups
from psaq_mm.engine import build_float_model, load_config

DEMOS = dict(mask_rcnn='mask_rcnn_swin_demo.py', cascade='cascade_mask_rcnn_swin_demo.py',
             upernet='upernet_swin_demo.py', swin='swin_demo.py', deit='deit_demo.py')
GROUPS = dict(
    mask_rcnn=('backbone', 'neck', 'scores', 'deltas', 'rois'),
    cascade=('backbone', 'neck', 'scores', 'deltas', 'rois'),
    upernet=('backbone', 'logits'), swin=('backbone', 'logits'), deit=('backbone', 'logits'),
    retinanet=('backbone', 'neck', 'scores', 'deltas'),
    fcos=('backbone', 'neck', 'scores', 'deltas'))
SIZE = (64, 96)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A float model of each family, made when first asked for, on which
    nothing may leave a trace."""
    built, folder = {}, tmp_path_factory.mktemp('configs')

    def get(name):
        if name not in built:
            torch.manual_seed(0)
            path = DEMO / DEMOS[name] if name in DEMOS else single_stage(name, folder)
            built[name] = build_float_model(load_config(path))
            for parameter in built[name].parameters():
                parameter.requires_grad_(False)
        return built[name]

    return get


def images_for(name):
    size = (112, 112) if name in ('swin', 'deit') else SIZE
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='module')
def record(models):
    """The taps of a model, in all groups it has."""
    found = {}

    def get(name):
        if name not in found:
            model = models(name)
            with torch.no_grad():
                found[name] = find_adapter(model).forward_taps(model, images_for(name),
                                                               GROUPS[name])
        return found[name]

    return get


def of_group(taps, group):
    """Its tensors, by their numbers."""
    chosen = {tap: value for tap, value in taps.items() if tap.split('.')[0] == group}
    assert list(chosen) == [f'{group}.{i}' for i in range(len(chosen))]
    return list(chosen.values())


def assert_equal(ours, theirs):
    theirs = list(theirs)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)


@pytest.mark.parametrize('name', GROUPS)
def test_groups(name, models, record):
    model = models(name)
    assert find_adapter(model).tap_groups(model) == GROUPS[name]
    taps = record(name).taps
    assert tuple(dict.fromkeys(tap.split('.')[0] for tap in taps)) == GROUPS[name]
    for value in taps.values():
        assert len(value) == 2 and torch.isfinite(value).all()
        assert value.std() > 0 and not torch.equal(value[0], value[1])


@pytest.mark.parametrize('name', ['mask_rcnn', 'cascade', 'retinanet', 'fcos'])
def test_detectors(name, models, record):
    """Equal to extract_feat's maps and the dense head's outputs."""
    model, taps, images = models(name), record(name).taps, images_for(name)
    head = getattr(model, 'rpn_head', None) or model.bbox_head
    with torch.no_grad():
        assert_equal(of_group(taps, 'backbone'), model.backbone(images))
        features = model.extract_feat(images)
        assert_equal(of_group(taps, 'neck'), features)
        scores, deltas = head(features)[:2]
    assert_equal(of_group(taps, 'scores'), scores)
    assert_equal(of_group(taps, 'deltas'), deltas)
    # As the confident loss needs them: 4 deltas and some scores for each anchor.
    anchors = {'retinanet': 9, 'fcos': 1}.get(name, 3)
    for score, delta in zip(of_group(taps, 'scores'), of_group(taps, 'deltas')):
        assert delta.shape[1] == 4 * anchors and score.shape[1] % anchors == 0
        assert score.shape[2:] == delta.shape[2:]
    assert (record(name).regions is None) == (name not in ('mask_rcnn', 'cascade'))


def host_boxes(model, features, rois, stage=None):
    """The best class of each region by a box head, its score, and the box it makes of it."""
    head, extractor = (part if stage is None else part[stage] for part in (
        model.roi_head.bbox_head, model.roi_head.bbox_roi_extractor))
    logits, deltas = head(extractor(features[:extractor.num_inputs], rois))
    score, label = logits.softmax(1)[:, :-1].max(1)
    if deltas.shape[1] > 4:
        deltas = deltas.unflatten(1, (-1, 4))[range(len(rois)), label]
    return score, head.bbox_coder.decode(rois[:, 1:], deltas, max_shape=SIZE)


@pytest.mark.parametrize('name', ['mask_rcnn', 'cascade'])
def test_regions_are_those_of_a_test(name, models, record):
    """The RPN's best proposals for box heads, what they make of them for the next stage, and
    the best detections for mask heads; as many of each image."""
    from mmdet.structures import DetDataSample
    model, regions = models(name), record(name).regions
    samples = [DetDataSample(metainfo=dict(img_shape=SIZE, ori_shape=SIZE, scale_factor=(1., 1.)))
               for _ in range(2)]
    with torch.no_grad():
        features = model.extract_feat(images_for(name))
        proposals = [found.bboxes for found in model.rpn_head.predict(features, samples)]
    *of_boxes, of_masks = regions
    assert len(of_boxes) == (3 if name == 'cascade' else 1)
    for rois, most in ((of_boxes[0], 64), (of_masks, 16)):
        assert 0 < len(rois) <= 2 * most
        assert rois[:, 0].tolist() == [0.] * (len(rois) // 2) + [1.] * (len(rois) // 2)
    count = len(of_boxes[0]) // 2
    assert torch.equal(of_boxes[0], bbox2roi([boxes[:count] for boxes in proposals]))
    for stage, rois in enumerate(of_boxes):
        with torch.no_grad():
            score, boxes = host_boxes(model, features, rois, stage if name == 'cascade' else None)
        if stage + 1 < len(of_boxes):
            torch.testing.assert_close(of_boxes[stage + 1][:, 1:], boxes)
    if name == 'mask_rcnn':  # a cascade's scores are a mean over its stages
        for image in range(2):
            best = score[image * count:(image + 1) * count].argmax() + image * count
            torch.testing.assert_close(of_masks[image * (len(of_masks) // 2), 1:], boxes[best])


def host_outputs(roi_head, features, regions):
    """Scores, deltas and mask logits of each image, by the host's own parts."""
    found, cascade = [], isinstance(roi_head.bbox_head, nn.ModuleList)
    for stage, rois in enumerate(regions[:-1]):
        for kind, seen in (('bbox', rois), ('mask', regions[-1])):
            head, extractor = (part[stage] if cascade else part for part in (
                getattr(roi_head, f'{kind}_{part}') for part in ('head', 'roi_extractor')))
            found.append([[], []])
            for image in (0, 1):  # one alone
                own = seen[seen[:, 0] == image]
                out = head(extractor(features[:extractor.num_inputs], own))
                found[-1][image] += out if kind == 'bbox' else [out]
    return [torch.stack(images) for images in (
        pair for both in found for pair in zip(*both))]


@pytest.mark.parametrize('name, stages', [('mask_rcnn', 1), ('cascade', 3)])
def test_outputs_on_regions(name, stages, models, record):
    """Of each image its own regions."""
    model, found = models(name), record(name)
    with torch.no_grad():
        expected = host_outputs(model.roi_head, model.extract_feat(images_for(name)),
                                found.regions)
    rois = of_group(found.taps, 'rois')
    assert len(rois) == len(expected) == 3 * stages
    for one, other in zip(rois, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['mask_rcnn', 'cascade'])
def test_student_sees_the_regions_of_the_teacher(name, models, record):
    """Though its own would be others."""
    teacher, images = record(name), images_for(name)
    student = copy.deepcopy(models(name))
    with torch.no_grad():
        for parameter in student.rpn_head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    adapter = find_adapter(student)
    with torch.no_grad():
        given = adapter.forward_taps(student, images, ('rois', ), teacher.regions)
        own = adapter.forward_taps(student, images, ('rois', ))
    assert_equal(of_group(given.taps, 'rois'), of_group(teacher.taps, 'rois'))
    assert all(one is other for one, other in zip(given.regions, teacher.regions))
    assert own.regions[0].shape != teacher.regions[0].shape \
        or not torch.equal(own.regions[0], teacher.regions[0])


def test_settings_of_the_rpn_are_restored(models, record):
    record('mask_rcnn')
    assert models('mask_rcnn').rpn_head.test_cfg.max_per_img == 300


def test_no_regions(models, record):
    """Then RoI heads have nothing to compare."""
    model = models('mask_rcnn')
    with torch.no_grad():
        found = find_adapter(model).forward_taps(model, images_for('mask_rcnn'),
                                                 ('backbone', 'rois'), [])
    assert list(found.taps) == [f'backbone.{i}' for i in range(4)]


@pytest.mark.parametrize('name', ['mask_rcnn', 'upernet', 'swin'])
@pytest.mark.parametrize('index', [0, 1, 3])
def test_only_what_is_wanted(name, index, models, record):
    """And of what is not, no head runs."""
    group, model = GROUPS[name][min(index, len(GROUPS[name]) - 1)], models(name)
    ran = []
    handles = [part.register_forward_hook(lambda module, args, out, key=key: ran.append(key))
               for key, part in model.named_children()]
    with torch.no_grad():
        found = find_adapter(model).forward_taps(model, images_for(name), (group, ))
    for handle in handles:
        handle.remove()
    expected = {tap: value for tap, value in record(name).taps.items()
                if tap.startswith(group + '.')}
    assert list(found.taps) == list(expected)
    assert_equal(list(found.taps.values()), expected.values())
    needed = dict(backbone=['backbone'], neck=['backbone', 'neck'], logits=['backbone',
                                                                            'decode_head'],
                  deltas=['backbone', 'neck', 'rpn_head'])
    assert ran == (['model'] if name == 'swin' else needed[group])


def test_segmentor(models, record):
    """The decode head's logits, before they are resized."""
    model, taps, images = models('upernet'), record('upernet').taps, images_for('upernet')
    with torch.no_grad():
        features = model.extract_feat(images)
        assert_equal(of_group(taps, 'backbone'), features)
        logits = model.decode_head(features)
    assert_equal(of_group(taps, 'logits'), [logits])
    assert logits.shape == (2, 7, SIZE[0] // 4, SIZE[1] // 4)


def test_timm_swin(models, record):
    model, taps, images = models('swin'), record('swin').taps, images_for('swin')
    with torch.no_grad():
        assert_equal(of_group(taps, 'logits'), [model.model(images)])
        x, stages = model.model.patch_embed(images), []
        for layer in model.model.layers:
            x = layer(x)
            stages.append(x)
    assert_equal(of_group(taps, 'backbone'), stages)
    assert len(stages) == 3


def test_timm_deit(models, record):
    """The ends of four equal parts of its blocks, as forward_intermediates has them."""
    model, taps, images = models('deit'), record('deit').taps, images_for('deit')
    with torch.no_grad():
        assert_equal(of_group(taps, 'logits'), [model.model(images)])
        intermediates = model.model.forward_intermediates(
            images, indices=4, output_fmt='NLC', return_prefix_tokens=True,
            intermediates_only=True)
    expected = [torch.cat([prefix, patches], 1) for patches, prefix in intermediates]
    assert_equal(of_group(taps, 'backbone'), expected)


@pytest.mark.parametrize('depth, expected', [
    (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 2, 3, 5]),
    (12, [2, 5, 8, 11])])
def test_parts_of_a_vit(depth, expected):
    model = timm.create_model('deit_tiny_patch16_224', img_size=32, embed_dim=16, depth=depth,
                              num_heads=2, num_classes=5).eval()
    images, outputs = torch.randn(1, 3, 32, 32), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        taps = find_adapter(model).forward_taps(model, images, ('backbone', )).taps
    assert_equal(of_group(taps, 'backbone'), [outputs[index] for index in expected])


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
def test_backbone_alone(host):
    module = pytest.importorskip(f'{host}.models.backbones.swin')
    backbone = module.SwinTransformer(embed_dims=8, depths=(1, 1), num_heads=(1, 2),
                                      strides=(4, 2), out_indices=(0, 1))
    backbone.eval()
    adapter, images = find_adapter(backbone), torch.randn(2, 3, 32, 40)
    assert adapter.tap_groups(backbone) == ('backbone', )
    with torch.no_grad():
        found = adapter.forward_taps(backbone, images, ('backbone', ))
        assert_equal(of_group(found.taps, 'backbone'), backbone(images))
    assert found.regions is None


def test_heads_that_take_more_than_features():
    """Mask2Former asks for samples too, GLIP for words: the rest of such a model is compared."""
    from mmdet.models.dense_heads import ATSSHead, ATSSVLFusionHead
    from mmseg.models.decode_heads import FCNHead, Mask2FormerHead

    def model_of(**parts):
        model = torch.nn.Module()
        model.with_neck = True
        vars(model).update(parts)
        return model

    for kind, groups in ((Mask2FormerHead, ()), (FCNHead, ('logits', ))):
        head = kind.__new__(kind)  # its signature counts
        for heads in (head, torch.nn.ModuleList()):
            torch.nn.Module.__init__(head)
            if heads is not head:
                heads.append(head)
            segmentor = model_of(encode_decode=None, decode_head=heads)
            assert tap_groups(segmentor) == ('backbone', 'neck', *groups)
    for kind, groups in ((ATSSVLFusionHead, ()), (ATSSHead, ('scores', 'deltas'))):
        head = kind.__new__(kind)
        assert tap_groups(model_of(bbox_head=head)) == ('backbone', 'neck', *groups)


@pytest.mark.parametrize('name', ['mask_rcnn', 'swin'])
def test_quantized_student_has_the_same_taps(name, models, record):
    """And gradients reach images and weights through all of them."""
    student = plain_student(models(name))
    images, teacher = images_for(name), record(name)
    psaq_mm.calibrate(student, images)
    weight = next(p for key, p in student.named_parameters() if 'qkv.weight' in key)
    weight.requires_grad_(True)
    images.requires_grad_(True)
    found = find_adapter(student).forward_taps(student, images, GROUPS[name], teacher.regions)
    assert {tap: v.shape for tap, v in found.taps.items()} == {
        tap: v.shape for tap, v in teacher.taps.items()}
    for value in found.taps.values():
        gradients = torch.autograd.grad(value.square().sum(), (images, weight),
                                        retain_graph=True)
        assert all(gradient.any() for gradient in gradients)
    distance = (found.taps['backbone.0'] - teacher.taps['backbone.0']).abs().mean()
    assert 0 < distance < 0.2 * teacher.taps['backbone.0'].abs().mean()

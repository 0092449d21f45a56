# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whole models of mmdet and mmseg: what runs, what is quantized, what is recorded."""
import copy
from contextlib import ExitStack

import pytest
import torch
from conftest import DEMO, ROOT, plain_student
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.structures import DetDataSample
from small_models import detector
from torch import nn

import psaq_mm
from psaq_mm import SynthesisSettings
from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.mmdet_swin import MMDetSwinAdapter
from psaq_mm.adapters.mmseg_swin import MMSegSwinAdapter, QuantMMSegWindowMSA
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.ops import QuantConv2d, QuantConvTranspose2d, named_quant_ops
from psaq_mm.prior import channel_statistics

CONFIGS = dict(
    mask_rcnn=DEMO / 'mask_rcnn_swin_demo.py',
    cascade=DEMO / 'cascade_mask_rcnn_swin_demo.py',
    upernet=DEMO / 'upernet_swin_demo.py')
BACKBONE = dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 2))


@pytest.fixture(scope='module')
def models():
    """One float model of each family, on which nothing may leave a trace."""
    built = {}
    for name, path in CONFIGS.items():
        torch.manual_seed(0)
        built[name] = build_float_model(load_config(path))
    return built


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def head_names(model):
    return {name for name, m in model.named_modules()
            if isinstance(m, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))
            and not name.startswith('backbone.')}


@pytest.mark.parametrize('name', CONFIGS)
def test_adapter(models, name):
    expected = MMSegSwinAdapter if name == 'upernet' else MMDetSwinAdapter
    adapter = find_adapter(models[name])
    assert type(adapter) is expected
    assert adapter.is_rgb(models[name])
    lower, upper = adapter.valid_range(models[name])
    assert lower.flatten().tolist() == pytest.approx([-2.1179, -2.0357, -1.8044], abs=1e-4)
    assert upper.flatten().tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('scope', ['backbone', 'model'])
def test_every_layer_in_scope_sees_data(models, images, name, scope, tmp_path):
    model = plain_student(models[name], scope=scope)
    psaq_mm.calibrate(model, images)  # raises for a quantizer that saw nothing
    heads = {n for n, _ in named_quant_ops(model) if not n.startswith('backbone.')}
    expected = set() if scope == 'backbone' else head_names(models[name])
    # what only trains has no part in inference, and stays float
    assert heads == {n for n in expected if not n.startswith('auxiliary_head')}
    psaq_mm.save(model, tmp_path / 'q.pth')
    loaded = psaq_mm.load(copy.deepcopy(models[name]), tmp_path / 'q.pth')
    adapter = find_adapter(model)
    with torch.no_grad():
        for one, other in zip(adapter.forward_backbone(model, images),
                              adapter.forward_backbone(loaded, images)):
            assert torch.equal(one, other)
    state, float_state = psaq_mm.unwrap(model).state_dict(), models[name].state_dict()
    assert all(torch.equal(state[k], float_state[k]) for k in float_state)


def test_transposed_convolution_of_mask_heads(models):
    for name, count in (('mask_rcnn', 1), ('cascade', 3)):
        model = plain_student(models[name], scope='model')
        ops = [op for _, op in named_quant_ops(model) if isinstance(op, QuantConvTranspose2d)]
        assert len(ops) == count
        assert all({'weight', 'input'} == set(op.quantizers) for op in ops)


def test_segmentor_runs_as_it_predicts(models, images):
    """forward_model of a segmentor is what inference in whole mode computes."""
    model = models['upernet']
    logits = []
    handle = model.decode_head.conv_seg.register_forward_hook(
        lambda module, args, output: logits.append(output))
    with torch.no_grad():
        find_adapter(model).forward_model(model, images)
        model.predict(images)
    handle.remove()
    assert torch.equal(*logits)


def test_quantized_segmentor_predicts_through_quantized_ops(models, images):
    model = plain_student(models['upernet'], scope='model',
                             weight=dict(bits=2), activation=dict(bits=2))
    psaq_mm.calibrate(model, images)
    assert any(isinstance(m, QuantMMSegWindowMSA) for m in model.modules())
    assert isinstance(model.decode_head.conv_seg, QuantConv2d)
    with torch.no_grad():
        quantized = model.predict(images)[0].seg_logits.data
        plain = models['upernet'].predict(images)[0].seg_logits.data
    assert quantized.shape == plain.shape == (7, 64, 96)
    assert not torch.allclose(quantized, plain, atol=1e-2)


# What RoI heads see


def rois_of(model, images):
    """Per call of a box or mask head, the RoIs it is given in scope `model`."""
    found = []
    with ExitStack() as hooks, torch.no_grad():
        for name, part in model.roi_head.named_modules():
            if isinstance(part, SingleRoIExtractor):
                hooks.enter_context(part.register_forward_pre_hook(
                    lambda module, args, kind=name[:4]: found.append((kind, args[1]))))
        find_adapter(model).forward(model, images, 'model')
    return found


def shown(model, images):
    """What the model detects in a test."""
    samples = [DetDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96),
                                           scale_factor=(1., 1.))) for _ in images]
    with torch.no_grad():
        return [s.pred_instances.bboxes for s in model.predict(images, samples, rescale=False)]


def test_mask_head_sees_the_detections_of_all_images():
    torch.manual_seed(0)
    model, images = detector(), torch.randn(3, 3, 64, 96)
    (box, proposals), (mask, detections) = rois_of(model, images)
    assert (box, mask) == ('bbox', 'mask')
    assert proposals[:, 0].tolist() == sorted([0, 1, 2] * 20)  # max_per_img of its RPN
    for image, boxes in enumerate(shown(model, images)):
        own = detections[detections[:, 0] == image, 1:]
        assert len(own) == 32 < len(boxes)
        assert torch.equal(own, boxes[:32])
        # The same as alone.
        torch.testing.assert_close(rois_of(model, images[[image]])[1][1][:, 1:], own,
                                   rtol=1e-4, atol=1e-2)


def test_mask_head_sees_something_where_nothing_is_detected():
    torch.manual_seed(0)
    model, images = detector(), torch.randn(2, 3, 64, 96)
    before = rois_of(model, images)[1][1]
    test_cfg = copy.deepcopy(model.roi_head.test_cfg)
    with torch.no_grad():
        model.roi_head.bbox_head.fc_cls.bias[-1] += 8
    assert all(len(boxes) == 0 for boxes in shown(model, images))
    after = rois_of(model, images)[1][1]
    assert [int((after[:, 0] == image).sum()) for image in (0, 1)] == [32, 32]
    # Scores fall alike, but for what the softmax over more background leaves of them.
    assert len({tuple(r) for r in after.tolist()} & {tuple(r) for r in before.tolist()}) > 32
    assert model.roi_head.test_cfg == test_cfg


def test_cascade_bounds_what_each_stage_sees(models, images):
    model = models['cascade']
    found = rois_of(model, images)
    assert [kind for kind, _ in found] == ['bbox'] * 3 + ['mask'] * 3
    for kind, rois in found:
        counts = [int((rois[:, 0] == image).sum()) for image in range(len(images))]
        assert min(counts) > 0 and max(counts) <= (256 if kind == 'bbox' else 32)
    boxes, masks = [r for k, r in found if k == 'bbox'], [r for k, r in found if k == 'mask']
    assert not torch.equal(boxes[0], boxes[1]) and not torch.equal(boxes[1], boxes[2])
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])


# BatchNorm statistics


@pytest.mark.parametrize('name, layers', [('upernet', 13), ('cascade', 12), ('mask_rcnn', 0)])
def test_batch_norm_records(models, images, name, layers):
    """One for each BatchNorm of the heads, the auxiliary one's included; of
    what went in, beside what is stored."""
    model, adapter = models[name], find_adapter(models[name])
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == layers
    seen = {}
    handles = [m.register_forward_pre_hook(lambda m, args: seen.setdefault(m, args[0]))
               for m in norms]
    with torch.no_grad(), adapter.record_batch_norm(model) as recorder:
        adapter.forward_norms(model, images)
        records = recorder.pop_all()
    for handle in handles:
        handle.remove()
    assert len(records) == len(seen) == layers
    for record, (norm, value) in zip(records, seen.items()):
        mean, var = channel_statistics(value)
        assert torch.equal(record.mean, mean)
        assert torch.equal(record.var, var)
        assert record.running_mean is norm.running_mean
        assert record.running_var is norm.running_var
        assert record.eps == norm.eps
    assert not any(m._forward_pre_hooks for m in norms)


def test_batch_norm_runs_on_few_proposals(models, images):
    model, counts = models['cascade'], []
    before = copy.deepcopy(model.rpn_head.test_cfg)
    handle = model.roi_head.bbox_head[0].register_forward_pre_hook(
        lambda module, args: counts.append(len(args[0])))
    adapter = find_adapter(model)
    with torch.no_grad():
        adapter.forward_norms(model, images)
        adapter.forward(model, images, 'model')
    handle.remove()
    assert counts[0] <= 2 * 64 < counts[1]
    assert model.rpn_head.test_cfg == before


@pytest.mark.parametrize('name', ['upernet', 'cascade'])
def test_images_descend_on_the_statistics(models, name):
    losses = []
    psaq_mm.synthesize(
        models[name], SynthesisSettings(
            num_images=1, image_size=112, steps=12, shifts=(0, ), flip=0., lr=0.1,
            priors=dict(batch_norm=dict(type='BatchNormPrior'))),
        progress=lambda values: losses.append(values['batch_norm']))
    assert losses[-1] < 0.8 * losses[0]


def test_statistics_need_batch_norm(models):
    with pytest.raises(psaq_mm.UserError, match='priors.batch_norm needs BatchNorm statistics'):
        psaq_mm.synthesize(models['mask_rcnn'], SynthesisSettings(
            num_images=1, image_size=56, steps=1,
            priors=dict(batch_norm=dict(type='BatchNormPrior'))))


# Other heads: no code of ours knows them


@pytest.mark.parametrize('host', [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'mmdet::atss/atss_r50_fpn_1x_coco.py',
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/models/fcn_r50-d8.py'])
@pytest.mark.parametrize('scope', ['backbone', 'model'])
def test_other_heads_on_a_swin(host, scope, tmp_path):
    """What docs/your_own_model.md says: inherit your config, add our base."""
    segmentor = host.startswith('mmseg')
    widths = [12, 24, 48, 96]
    outputs = (1, 2, 3) if any(n in host for n in ('retinanet', 'fcos', 'atss')) else (0, 1, 2, 3)
    backbone = dict(type='SwinTransformer', _delete_=True, out_indices=outputs, **BACKBONE)
    neck = f'neck=dict(in_channels={widths[-len(outputs):]}, start_level=0), '
    heads = 'decode_head=dict(in_channels=96), auxiliary_head=dict(in_channels=48)' \
        if 'fcn' in host else \
        f'decode_head=dict(in_channels={widths}), auxiliary_head=dict(in_channels=48)'
    config = tmp_path / 'mine.py'
    config.write_text(
        f"_base_ = ['{host}', '{ROOT}/configs/_base_/w8a8.py']\n"
        f'model = dict(backbone={backbone!r}, {heads if segmentor else neck})\n'
        + ("default_scope = 'mmseg'\n" if segmentor else '')
        + ('model["data_preprocessor"] = dict(size=(64, 96))\n' if segmentor else ''))
    config = load_config(config)
    model = build_float_model(config)
    torch.manual_seed(0)
    images = psaq_mm.synthesize(model, SynthesisSettings(
        num_images=1, image_size=(64, 96), steps=1))
    model = plain_student(model, scope=scope)
    psaq_mm.calibrate(model, images)
    outside = [n for n, _ in named_quant_ops(model) if not n.startswith('backbone.')]
    assert bool(outside) is (scope == 'model')

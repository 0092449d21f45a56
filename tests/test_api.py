# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import copy
import errno
import math
import os
from contextlib import contextmanager

import pytest
import timm
import torch
from mmdet.models.backbones.swin import SwinTransformer
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmseg.models.backbones import SwinTransformer as MMSegSwin
from torch import nn

import psaq_mm
from psaq_mm import UserError, api
from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import MANIFEST_KEY, load_checkpoint_file
from psaq_mm.ops import QuantOp, named_quant_ops
from psaq_mm.prior import PatchSimilarityPrior
from psaq_mm.quantization import Quantizer

FEW = dict(num_images=3, batch_size=2, image_size=56, steps=2)


def swin(**changes):
    model = SwinTransformer(**{**dict(embed_dims=16, depths=(2, 2), num_heads=(1, 2),
                                      strides=(4, 2), out_indices=(0, 1)), **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval()
    return model


@pytest.fixture
def build_detector(demo_config):
    """Builds Mask R-CNN on a backbone of width 16."""

    def build():
        init_default_scope('mmdet')
        model = Config.fromfile(str(demo_config)).model
        model.backbone.update(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
        model.neck.update(in_channels=[16, 32, 64, 128], out_channels=16)
        model.rpn_head.update(in_channels=16, feat_channels=16)
        model.test_cfg.rpn.max_per_img = 20
        for part in ('bbox_roi_extractor', 'mask_roi_extractor'):
            model.roi_head[part].out_channels = 16
        model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
        model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1)
        detector = MODELS.build(model)
        detector.eval()
        return detector

    return build


@pytest.fixture
def images():
    return torch.randn(2, 3, 56, 56)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@contextmanager
def left_as_it_was(model):
    """Modes, gradients, weights, classes and hooks are the same after the block."""
    modes = {m: m.training for m in model.modules()}
    gradients = {p: p.requires_grad for p in model.parameters()}
    classes = {name: type(m) for name, m in model.named_modules()}
    state = state_of(model)
    yield
    assert {m: m.training for m in model.modules()} == modes
    assert {p: p.requires_grad for p in model.parameters()} == gradients
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert_state(model, state)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


# synthesize


def test_images(images):
    model = swin()
    made = psaq_mm.synthesize(model, **FEW)
    assert made.shape == (3, 3, 56, 56) and not made.requires_grad
    assert made.min() >= 0 and made.max() <= 255  # a backbone alone has no normalization
    assert made.std() > 0.1


def test_images_are_in_the_range_of_the_detector(build_detector):
    made = psaq_mm.synthesize(build_detector(), lr=100., **FEW)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for channel in range(3):
        values = made[:, channel]
        assert float(values.min()) == pytest.approx(-mean[channel] / std[channel])
        assert float(values.max()) == pytest.approx((255 - mean[channel]) / std[channel])


def test_seed():
    model = swin()
    first, second = (psaq_mm.synthesize(model, seed=3, **FEW) for _ in range(2))
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(first, second)
    assert torch.equal(psaq_mm.synthesize(model, seed=3, **FEW), first)
    other = psaq_mm.synthesize(model, seed=4, **FEW)
    assert all(not torch.equal(a, b) for a, b in zip(first, other))
    assert torch.equal(psaq_mm.synthesize(model, **FEW), psaq_mm.synthesize(model, seed=0, **FEW))


def partly_trained():
    """A model as in training, with some of it frozen and some in eval mode."""
    model = swin(drop_path_rate=0.5)
    model.train()
    model.stages[0].eval()
    model.patch_embed.projection.weight.requires_grad_(False)
    model.stages[1].blocks[0].with_cp = True
    return model


def test_model_is_left_as_it_was():
    model = partly_trained()
    with left_as_it_was(model):
        first = psaq_mm.synthesize(model, **FEW)
        assert torch.equal(psaq_mm.synthesize(model, **FEW), first)  # no dropped paths
    assert model.stages[1].blocks[0].with_cp


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize('after', [1, 4, 7])
def test_model_is_left_as_it_was_when_interrupted(error, after):
    model = partly_trained()
    calls = []

    def progress(losses):
        calls.append(losses)
        if len(calls) == after:
            raise error('stop')

    with left_as_it_was(model), pytest.raises(error):
        psaq_mm.synthesize(model, progress=progress, **FEW)
    assert len(calls) == after
    assert model.stages[1].blocks[0].with_cp


def test_model_is_left_as_it_was_when_it_fails(monkeypatch):
    model = partly_trained()

    def fail(self, state):
        raise RuntimeError('out of memory')

    monkeypatch.setattr(PatchSimilarityPrior, '__call__', fail)
    with left_as_it_was(model), pytest.raises(RuntimeError, match='out of memory'):
        psaq_mm.synthesize(model, **FEW)


def test_model_with_nan():
    model = swin()
    model.stages[1].blocks[1].attn.w_msa.qkv.bias.data[3] = math.nan
    with pytest.raises(FloatingPointError, match='not finite at step 0: patch_similarity nan'):
        psaq_mm.synthesize(model, **FEW)


def test_gradients_may_be_off():
    model = swin()
    expected = psaq_mm.synthesize(model, **FEW)
    with torch.no_grad():
        assert torch.equal(psaq_mm.synthesize(model, **FEW), expected)


def test_progress():
    calls = []
    psaq_mm.synthesize(swin(), progress=calls.append, **FEW)
    assert len(calls) == 2 * 2 * 2  # batches, phases, steps
    for losses in calls:
        assert set(losses) == {'patch_similarity', 'total_variation', 'total'}
        assert losses['total'] == pytest.approx(
            losses['patch_similarity'] + losses['total_variation'], rel=1e-6)


def test_steps_by_hand():
    model = swin()
    with api.synthesizer(model, seed=2, **FEW) as images:
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        while not images.done:
            images.step()
    assert torch.equal(images.images, psaq_mm.synthesize(model, seed=2, **FEW))


def test_wrong_settings_and_models():
    model = partly_trained()
    with left_as_it_was(model):
        with pytest.raises(UserError, match='synthesis.steps must be a positive integer'):
            psaq_mm.synthesize(model, steps=0)
        with pytest.raises(UserError, match="Did you mean 'num_images'"):
            psaq_mm.synthesize(model, images=4)
    with pytest.raises(UserError, match='is Linear; expected a Swin Transformer'):
        psaq_mm.synthesize(nn.Linear(2, 2))


# quantize and calibrate


def test_quantize(images):
    """Quantization is off until the model is calibrated; unwrap undoes it."""
    model = swin()
    expected = [out.detach() for out in model(images)]
    modules = {name: id(module) for name, module in model.named_modules()}
    assert psaq_mm.quantize(model, weight=dict(bits=4)) is model
    assert len(dict(named_quant_ops(model))) == 22
    assert all(torch.equal(a, b) for a, b in zip(model(images), expected))
    assert psaq_mm.calibrate(model, images) is model
    assert not torch.equal(model(images)[1], expected[1])
    assert psaq_mm.unwrap(model) is model
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert all(torch.equal(a, b) for a, b in zip(model(images), expected))


@pytest.mark.parametrize('settings, match', [
    (dict(weight=dict(bits=9)), 'quantization.weight.bits must be an integer from 2 to 8'),
    (dict(bits=4), 'unknown key quantization.bits'),
    (dict(include='layers.*'), "'layers.*' matches no module"),
    (dict(exclude='*'), 'nothing is left to quantize'),
    (dict(placement='v2'), 'placement must be one of'),
])
def test_refused_quantization(settings, match):
    model = swin()
    with left_as_it_was(model), pytest.raises(UserError, match=match):
        psaq_mm.quantize(model, **settings)


def test_quantize_twice():
    model = psaq_mm.quantize(swin())
    with left_as_it_was(model), pytest.raises(UserError, match='the model is quantized already'):
        psaq_mm.quantize(model)
    psaq_mm.quantize(psaq_mm.unwrap(model), weight=dict(bits=4))


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    model = swin()
    bad = model.stages[1].blocks[0].ffn.layers[1]
    bad.weight.data[2, 3] = value
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=r'NaN or infinity in stages.1.blocks.0.ffn.layers.1.wei'):
        psaq_mm.quantize(model)
    assert [type(module) for module in model.modules()] == classes
    psaq_mm.quantize(model, exclude='stages.1.blocks.0.ffn.*')  # not looked at
    psaq_mm.quantize(psaq_mm.unwrap(model), placement=['input'])


def test_failure_while_quantizing(monkeypatch):
    """Whatever happens between two modules, none stays quantized."""
    from_float = QuantOp.from_float.__func__
    made = []

    def fail(cls, *args):
        made.append(cls)
        if len(made) == 5:
            raise MemoryError
        return from_float(cls, *args)

    monkeypatch.setattr(QuantOp, 'from_float', classmethod(fail))
    model = swin()
    with left_as_it_was(model), pytest.raises(MemoryError):
        psaq_mm.quantize(model)
    assert len(made) == 5


def test_calibrate_restores_the_modes(images):
    model = psaq_mm.quantize(partly_trained())
    modes = {m: m.training for m in model.modules()}
    psaq_mm.calibrate(model, images)
    assert {m: m.training for m in model.modules()} == modes
    with pytest.raises(KeyboardInterrupt):
        psaq_mm.calibrate(model, images, progress=interrupt)
    assert {m: m.training for m in model.modules()} == modes


def interrupt(done):
    raise KeyboardInterrupt


@pytest.mark.parametrize('settings, match', [
    (dict(batch_size=0), 'calibration.batch_size must be a positive integer'),
    (dict(batches=2), "unknown key calibration.batches. Did you mean 'batch_size'"),
])
def test_refused_calibration(settings, match, images):
    model = psaq_mm.quantize(swin())
    with pytest.raises(UserError, match=match):
        psaq_mm.calibrate(model, images, **settings)


@pytest.mark.parametrize('settings, expected', [
    (dict(), 'backbone'), (dict(scope='model'), 'model'),
    (dict(scope='model', include='backbone.*'), 'backbone'),
    (dict(scope='model', include='neck.*'), 'model'),
])
def test_scope(settings, expected, build_detector):
    model = psaq_mm.quantize(build_detector(), **settings)
    assert api.scope_of(model, find_adapter(model)) == expected


# save and load


def raw_outputs(model, images):
    """Outputs of all heads on the model's own proposals, before any threshold."""
    found = []
    adapter = find_adapter(model)
    handles = [module.register_forward_hook(lambda _, __, out: found.append(out))
               for module in (model.backbone, model.neck, model.rpn_head,
                              model.roi_head.bbox_head, model.roi_head.mask_head)]
    with torch.no_grad():
        adapter.forward_model(model, images)
    for handle in handles:
        handle.remove()
    return list(tensors_in(found))


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


@pytest.mark.parametrize('settings', [
    dict(), dict(scope='model'), dict(scope='model', weight=dict(bits=4), activation=dict(bits=4)),
    dict(scope='model', placement='v1', learnable_ranges=True),
], ids=['backbone', 'model', 'W4A4', 'v1'])
def test_detector(settings, build_detector, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    model = psaq_mm.quantize(build_detector(), **settings)
    psaq_mm.calibrate(model, images)
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    expected = raw_outputs(model, images)
    torch.manual_seed(1)
    other = build_detector()
    assert not torch.equal(raw_outputs(other, images)[0], expected[0])
    psaq_mm.load(other, str(tmp_path / 'quantized.pth'))
    found = raw_outputs(other, images)
    assert len(found) == len(expected) == 4 + 5 + 2 * 5 + 2 + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def widen(model, pairs, factor=16.):
    """Make a channel of each norm ``factor`` times as wide, and compute the same."""
    with torch.no_grad():
        for norm, reader in pairs.items():
            norm, reader = model.get_submodule(norm), model.get_submodule(reader)
            norm.weight[3] *= factor
            norm.bias[3] *= factor
            reader.weight[:, 3] /= factor
    return model


def quantized_error(model, images, equalized, **settings):
    """Relative squared error of the feature maps."""
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        expected = teacher(images)
    if equalized:
        psaq_mm.equalize(teacher, images, channel_limit=1.5, **settings)
    student = psaq_mm.quantize(copy.deepcopy(teacher), **settings)
    psaq_mm.calibrate(student, images)
    student.eval()
    with torch.no_grad():
        return sum(float((a - b).square().sum() / a.square().sum())
                   for a, b in zip(expected, student(images)))


def test_wide_channels_do_no_harm():
    """However the scale is shared between norms and weights: the same function quantizes
    as well."""
    images = torch.rand(4, 3, 64, 72, generator=torch.Generator().manual_seed(3)) * 2 - 1
    model = swin()
    pairs = find_adapter(model).norm_readers(model)
    assert len(pairs) == 2 * 4 + 1
    wide = widen(copy.deepcopy(model), pairs)
    plain, harmed = (quantized_error(m, images, False) for m in (model, wide))
    assert harmed > 5 * plain
    assert quantized_error(wide, images, True) < 1.5 * plain


@pytest.mark.parametrize('build', [
    lambda: MMSegSwin(pretrain_img_size=64, embed_dims=16, depths=(1, 2), num_heads=(1, 2),
                      strides=(4, 2), out_indices=(0, 1)),
    lambda: timm.create_model('swin_tiny_patch4_window7_224', img_size=64, embed_dim=16,
                              depths=(1, 2), num_heads=(1, 2), window_size=4),
    lambda: timm.create_model('deit_tiny_patch16_224', img_size=64, embed_dim=16, depth=2,
                              num_heads=2)], ids=['mmseg', 'swin', 'deit'])
def test_equalize_leaves_what_other_hosts_compute(build):
    model, images = build(), torch.randn(2, 3, 64, 64)
    model.eval()
    adapter = find_adapter(model)
    widen(model, adapter.norm_readers(model))
    with torch.no_grad():
        expected = adapter.forward_backbone(model, images)
    before = state_of(model)
    psaq_mm.equalize(model, images, channel_limit=1.5)
    assert not all(torch.equal(a, b) for a, b in zip(before.values(), state_of(model).values()))
    with torch.no_grad():
        for found, value in zip(adapter.forward_backbone(model, images), expected):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_equalize_leaves_what_it_computes(build_detector):
    model = build_detector()
    pairs = find_adapter(model).norm_readers(model)
    widen(model, pairs)
    modes, images = [m.training for m in model.modules()], torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        expected = model.backbone(images)
    assert psaq_mm.equalize(model, images, batch_size=2, channel_limit=1.5) is model
    with torch.no_grad():
        for found, value in zip(model.backbone(images), expected):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    for norm in pairs:
        weight = model.get_submodule(norm).weight
        assert weight[3] < 4 * weight.median(), norm
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize('settings', [
    {}, dict(channel_limit=None), dict(channel_limit=1.5, placement=['weight', 'query']),
    dict(channel_limit=1.5, exclude=['*.qkv', '*ffn*', '*.reduction'])])
def test_equalize_does_nothing_where_inputs_stay_float(settings, images):
    model = swin()
    widen(model, find_adapter(model).norm_readers(model))
    before = state_of(model)
    psaq_mm.equalize(model, images, **settings)
    assert_state(model, before)


def test_what_equalize_refuses(model, images):
    limit = dict(channel_limit=1.5)
    teacher = swin()
    before = state_of(teacher)
    for change, message in (
            (dict(images=images[:0]), 'equalization needs float images of shape .*N, C, H, W'),
            (dict(model=model), 'the model is quantized already'),
            (dict(channel_limit=0.5), 'quantization.channel_limit must be None or a number from 1 '
                                      'on, got 0.5'),
            (dict(channel_limit=True), 'channel_limit must be None or a number'),
            (dict(batch_size=0), 'calibration.batch_size must be'),
            (dict(images=images * float('nan')),
             '^equalization failed: .*norm.*: values are not finite')):
        with pytest.raises(UserError, match=message):
            psaq_mm.equalize(**{**dict(model=teacher, images=images, **limit), **change})
        assert_state(teacher, before)
    broken = swin()
    with torch.no_grad():
        broken.stages[1].blocks[0].norm2.weight[3] = float('nan')
    with pytest.raises(UserError, match=r'NaN or infinity in stages.1.blocks.0.norm2.weight'):
        psaq_mm.equalize(broken, images, **limit)


def weights(model):
    return {name: op.weight.detach().clone() for name, op in named_quant_ops(model)
            if op.weight_quantizer is not None}


@pytest.mark.parametrize('size', [None, (96, 64)])
def test_round_weights(size, build_detector, tmp_path):
    """Of a whole detector: what learnt stays, the rest goes to its integers, and they
    are what a checkpoint keeps."""
    teacher, images = build_detector(), torch.randn(3, 3, 64, 64)
    model = psaq_mm.quantize(copy.deepcopy(teacher), scope='model',
                             weight=dict(bits=4, rounding='gptq'))
    psaq_mm.calibrate(model, images)
    modes, counts = [m.training for m in model.modules()], []
    with torch.no_grad():
        model.backbone.stages[0].blocks[0].ffn.layers[1].weight.mul_(0.9)  # it learnt
    before = weights(model)
    psaq_mm.round_weights(model, images, size, teacher, counts.append, batch_size=2)
    assert counts == ([2, 1] if size is None else [1, 1])
    for name, op in named_quant_ops(model):
        if op.weight_quantizer is None:
            continue
        changed = not torch.equal(op.weight, before[name])
        if name == 'backbone.stages.0.blocks.0.ffn.layers.1':
            assert not changed
        else:
            assert changed and torch.equal(op.weight_quantizer(op.weight), op.weight), name
    assert [m.training for m in model.modules()] == modes
    expected = raw_outputs(model, images)
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    other = build_detector()
    psaq_mm.load(other, str(tmp_path / 'quantized.pth'))
    assert all(torch.equal(a, b) for a, b in zip(raw_outputs(other, images), expected))


def test_round_weights_of_a_model_that_asks_for_nothing(model, images):
    before = weights(model)
    assert psaq_mm.round_weights(model, images) is model
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_what_round_weights_refuses(model, images):
    teacher = swin()
    before = weights(model)
    for change, message in (
            (dict(images=images[:0]), 'rounding needs float images of shape .*N, C, H, W'),
            (dict(images=None), 'rounding needs float images of shape .*, got NoneType'),
            (dict(model=psaq_mm.quantize(swin())), 'the student is not calibrated: call'),
            (dict(model=teacher), 'the student is not calibrated: call'),
            (dict(teacher=model), 'the teacher is quantized: pass the float model'),
            (dict(teacher=torch.nn.Linear(2, 2)),
             'the teacher is not the float model of the student: it has no .*.weight of shape'),
            (dict(batch_size=0), 'calibration.batch_size must be')):
        with pytest.raises(UserError, match=message):
            psaq_mm.round_weights(**{**dict(model=model, images=images, teacher=teacher),
                                     **change})
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_rounding_by_a_teacher_of_before_it_was_equalized(images):
    """Its weights differ from the student's by more than what was learnt."""
    settings = dict(weight=dict(bits=4, rounding='gptq'), channel_limit=1.5)
    teacher = swin()
    widen(teacher, find_adapter(teacher).norm_readers(teacher))
    model = psaq_mm.equalize(copy.deepcopy(teacher), images, **settings)
    equalized = copy.deepcopy(model)
    psaq_mm.calibrate(psaq_mm.quantize(model, **settings), images)
    before = weights(model)
    with pytest.raises(UserError, match=r'norm.*\.weight differs; psaq_mm.equalize comes before'):
        psaq_mm.round_weights(model, images, teacher=teacher)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    psaq_mm.round_weights(model, images, teacher=equalized)
    assert not any(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_rounding_of_a_layer_with_two_names(images):
    """That it learnt is no sign of another teacher, by either name."""
    teacher = swin()
    teacher.stages[0].blocks[1] = teacher.stages[0].blocks[0]
    model = psaq_mm.quantize(copy.deepcopy(teacher), weight=dict(bits=4, rounding='gptq'))
    psaq_mm.calibrate(model, images)
    with torch.no_grad():
        model.stages[0].blocks[1].attn.w_msa.qkv.weight.mul_(0.9)
    before = weights(model)
    psaq_mm.round_weights(model, images, teacher=teacher)
    assert [name for name, weight in weights(model).items()
            if torch.equal(weight, before[name])] == ['stages.0.blocks.0.attn.w_msa.qkv']


def test_rounding_of_what_is_not_finite(images):
    model = psaq_mm.quantize(swin(), weight=dict(bits=4, rounding='gptq'), placement='operands')
    psaq_mm.calibrate(model, images)
    with pytest.raises(UserError, match=r'^rounding failed: .* \(weight\): inputs of the layer '
                                        'are not finite'):
        psaq_mm.round_weights(model, images * float('nan'))


def test_rounding_helps_the_outputs():
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    teacher = swin()
    teacher.eval()

    def error(rounding):
        model = psaq_mm.quantize(copy.deepcopy(teacher), weight=dict(bits=3, rounding=rounding))
        psaq_mm.round_weights(psaq_mm.calibrate(model, images), images)
        with torch.no_grad():
            return sum(float((a - b).square().sum())
                       for a, b in zip(teacher(images), model.eval() or model(images)))

    assert error('gptq') < 0.8 * error('nearest')


@pytest.fixture
def model(images):
    return psaq_mm.calibrate(psaq_mm.quantize(swin()), images)


def test_what_is_recorded(model, tmp_path):
    path = tmp_path / 'quantized.pth'
    psaq_mm.save(model, path, meta=dict(dataset_meta=dict(classes=('a', 'b'))), seed=3,
                 source='swin.pth')
    checkpoint = load_checkpoint_file(path)
    assert checkpoint['meta'] == dict(dataset_meta=dict(classes=['a', 'b']))
    assert checkpoint[MANIFEST_KEY]['seed'] == 3
    assert checkpoint[MANIFEST_KEY]['source'] == 'swin.pth'
    with pytest.raises(UserError, match='modules cannot be recorded'):
        psaq_mm.save(model, path, modules=3)


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('function', ['fsync', 'replace'])
def test_failing_save_leaves_the_old_file(function, model, tmp_path, monkeypatch):
    path = tmp_path / 'quantized.pth'
    psaq_mm.save(model, path)
    old = path.read_bytes()
    with torch.no_grad():
        model.norm0.bias.add_(1.)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full_disk)
        with pytest.raises(UserError, match='quantized.pth could not be written: No space left'):
            psaq_mm.save(model, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ['quantized.pth']
    psaq_mm.save(model, path)
    assert path.read_bytes() != old


def test_what_cannot_be_saved_leaves_the_old_file(model, tmp_path):
    path = tmp_path / 'quantized.pth'
    path.write_bytes(b'old')
    for bad, match in ((swin(), 'no quantized modules'),
                       (psaq_mm.quantize(swin()), 'has no range')):
        with pytest.raises(UserError, match=match):
            psaq_mm.save(bad, path)
    with pytest.raises(UserError, match='nowhere'):
        psaq_mm.save(model, tmp_path / 'nowhere' / 'quantized.pth')
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['quantized.pth']


def test_no_quantized_checkpoint(tmp_path):
    model = swin()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'float.pth')
    (tmp_path / 'text.pth').write_text('text')
    with left_as_it_was(model):
        for name, match in (('float.pth', 'is not a quantized checkpoint of psaq_mm'),
                            ('text.pth', 'is not a checkpoint'),
                            ('missing.pth', 'there is no such file')):
            with pytest.raises(UserError, match=match) as caught:
                psaq_mm.load(model, tmp_path / name)
            assert name in str(caught.value)


@pytest.mark.parametrize('changes', [dict(embed_dims=32), dict(depths=(2, 3)),
                                     dict(num_heads=(2, 4))])
def test_checkpoint_of_another_model(changes, model, tmp_path):
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    other = swin(**changes)
    with left_as_it_was(other), pytest.raises(UserError, match='quantized.pth is not a'):
        psaq_mm.load(other, tmp_path / 'quantized.pth')


@pytest.mark.parametrize('part', [0.1, 0.5, 0.99])
def test_truncated_file(part, model, tmp_path):
    path = tmp_path / 'quantized.pth'
    psaq_mm.save(model, path)
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    other = swin()
    with left_as_it_was(other), pytest.raises(UserError, match='quantized.pth is not a checkp'):
        psaq_mm.load(other, path)


def test_loaded_model(model, tmp_path, images):
    """It keeps its modes, needs no calibration and can be trained."""
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    other = partly_trained()
    modes = {name: m.training for name, m in other.named_modules()}
    frozen = [name for name, p in other.named_parameters() if not p.requires_grad]
    psaq_mm.load(other, tmp_path / 'quantized.pth')
    assert {name: m.training for name, m in other.named_modules() if name in modes} == modes
    assert [name for name, p in other.named_parameters() if not p.requires_grad] == frozen
    assert all(m.enabled for m in other.modules() if isinstance(m, Quantizer))
    other.eval()
    sum(out.sum() for out in other(images)).backward()
    assert other.stages[0].blocks[0].attn.w_msa.qkv.weight.grad.abs().sum() > 0

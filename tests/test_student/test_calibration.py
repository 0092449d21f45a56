# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import copy
import io
import math
import pickle

import pytest
import torch
from conftest import plain_student
from mmdet.models.backbones.swin import SwinTransformer
from mmengine.model import ExponentialMovingAverage
from mmengine.runner.checkpoint import load_state_dict
from small_models import detector
from torch import nn

import psaq_mm
from psaq_mm.errors import UserError
from psaq_mm.ops import (
    QuantLinear,
    apply_plan,
    named_quant_ops,
    named_rotations,
    quantization_enabled,
    set_quantization,
)
from psaq_mm.quantization import Quantizer, QuantSpec
from psaq_mm.student import calibrate_ranges
from psaq_mm.student.history import require_teacher_of


def swin():
    model = SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                            out_indices=(0, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval()
    return model


@pytest.fixture
def images():
    return torch.randn(5, 3, 56, 56)


def named_quantizers(model):
    for name, op in named_quant_ops(model):
        for role, quantizer in op.quantizers.items():
            yield f'{name} ({role})', quantizer


def ranges(model):
    return {f'{name}.{end}': value.clone() for name, quantizer in named_quantizers(model)
            for end, value in zip(('lower', 'upper'), quantizer.range())}


def seen_by_hooks(model, images):
    """Smallest and largest value of each quantizer's input in a float pass."""
    seen = {}

    def watch(name):
        def hook(module, args):
            values = args[0]
            if module.axis is None:
                low, high = values.min(), values.max()
            else:
                rows = values.transpose(0, module.axis).flatten(1)
                low, high = rows.min(1).values, rows.max(1).values
            before = seen.get(name, (low, high))
            seen[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        return hook

    handles = [quantizer.register_forward_pre_hook(watch(name))
               for name, quantizer in named_quantizers(model) if 'weight' not in name]
    set_quantization(model, False)
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize('placement', ['operands', 'v1'])
@pytest.mark.parametrize('granularity', ['per_tensor', 'per_channel'])
@pytest.mark.parametrize('symmetric', [False, True])
def test_ranges_are_what_hooks_saw(placement, granularity, symmetric, images):
    model = plain_student(swin(), placement=placement, activation=dict(
        granularity=granularity, symmetric=symmetric))
    psaq_mm.calibrate(model, images, batch_size=2)
    seen = seen_by_hooks(model, images)
    quantizers = {name: quantizer for name, quantizer in named_quantizers(model)
                  if 'weight' not in name}
    assert len(seen) == len(quantizers) == (34 if placement == 'operands' else 48)
    for name, quantizer in quantizers.items():
        low, high = seen[name]
        low, high = low.clamp(max=0.), high.clamp(min=0.)  # 0 is always in the range
        assert quantizer.scale.shape == low.shape
        if symmetric:
            expected = torch.maximum(-low, high) / 127
            assert not quantizer.zero_point.any()
        else:
            expected = (high - low) / 255
            lower, upper = quantizer.range()
            # The zero point is an integer: the range may be off by half a step.
            assert ((lower - low).abs() <= 0.501 * expected).all(), name
            assert ((upper - high).abs() <= 0.501 * expected).all(), name
        torch.testing.assert_close(quantizer.scale, expected, rtol=1e-5, atol=1e-10, msg=name)


def test_batches_do_not_change_the_ranges(images):
    results = []
    model = plain_student(swin())
    for size in (1, 2, 5, 8):
        psaq_mm.calibrate(model, images, batch_size=size)
        results.append(ranges(model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-7, msg=name)


def test_batches_and_progress(images):
    model = plain_student(swin())
    sizes, done = [], []
    calibrate_ranges(model, images, lambda batch: (sizes.append(len(batch)), model(batch)),
                     batch_size=2, progress=done.append)
    assert sizes == done == [2, 2, 1]


def test_float_activations_are_observed(images):
    """A second calibration, of a model switched on, sets the same ranges."""
    model = plain_student(swin(), activation=dict(bits=2))
    psaq_mm.calibrate(model, images)
    first = ranges(model)
    psaq_mm.calibrate(model, images)
    assert all(torch.equal(value, first[name]) for name, value in ranges(model).items())


def test_afterwards(images):
    model = plain_student(swin())
    model.train()
    model.patch_embed.eval()
    before = {m: m.training for m in model.modules()}
    assert psaq_mm.calibrate(model, images) is model
    assert {m: m.training for m in model.modules()} == before
    for _, quantizer in named_quantizers(model):
        assert quantizer.observer is None and quantizer.active and not quantizer.learned
        assert not quantizer._forward_hooks and not quantizer._forward_pre_hooks


def test_ranges_of_weights(images):
    """They are the weight's own, and are set once: the weight may be learned after that."""
    model = plain_student(swin(), weight=dict(bits=4))
    psaq_mm.calibrate(model, images)
    for name, op in named_quant_ops(model):
        if op.weight_quantizer is not None:
            top = 127 if name == 'patch_embed.projection' else 7
            expected = op.weight.detach().flatten(1).abs().amax(1) / top
            torch.testing.assert_close(op.weight_quantizer.scale, expected)
    before = {n: q.scale.clone() for n, q in named_quantizers(model) if 'weight' in n}
    with torch.no_grad():
        for _, op in named_quant_ops(model):
            if op.weight_quantizer is not None:
                op.weight.mul_(0.5)
    psaq_mm.calibrate(model, 2 * images)
    assert all(torch.equal(q.scale, before[n]) for n, q in named_quantizers(model) if n in before)


def state_of(model):
    return {name: (q.scale.clone(), q.zero_point.clone(), q.learned)
            for name, q in named_quantizers(model)}


def assert_left_alone(model, before):
    """No range, switch, observer or hook is another."""
    for name, quantizer in named_quantizers(model):
        scale, zero_point, learned = before[name]
        assert torch.equal(quantizer.scale, scale), name
        assert torch.equal(quantizer.zero_point, zero_point), name
        assert quantizer.learned is learned and quantizer.enabled
        assert quantizer.observer is None
        assert not quantizer._forward_hooks and not quantizer._forward_pre_hooks


@pytest.fixture(params=[False, True], ids=['first', 'again'])
def student(request, images):
    """Without ranges, or with some of an earlier calibration, one of which was learned."""
    model = plain_student(swin())
    if request.param:
        psaq_mm.calibrate(model, 0.3 * images)
        next(q for n, q in named_quantizers(model) if 'weight' not in n).learned = True
    return model


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('index', [0, 3])
def test_images_that_are_not_finite(value, index, images, student):
    images = images.clone()
    images[index, 1, 5, 5] = value
    before = state_of(student)
    with pytest.raises(UserError, match=r'calibration failed: patch_embed.projection \(input\): '
                                        '.*NaN or infinite'):
        psaq_mm.calibrate(student, images, batch_size=2)
    assert_left_alone(student, before)


def test_activations_that_are_not_finite(images, student):
    before = state_of(student)
    student.stages[1].blocks[0].norm2.weight.data[3] = math.inf
    with pytest.raises(UserError, match=r'stages.1.blocks.0.ffn.layers.0.0 \(input\): '):
        psaq_mm.calibrate(student, images)
    assert_left_alone(student, before)


def rotated(model, images=None, **settings):
    return plain_student(model, images, roles=dict(input=dict(rotate=True)), **settings)


def test_rotated_inputs_have_no_mean_and_outputs_stay(images):
    model = swin()
    student = rotated(model, images)
    seen = {}
    for name, rotation in named_rotations(student):
        rotation.register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    with torch.no_grad(), quantization_enabled(student, False):
        for got, expected in zip(student(images), model(images)):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 4 * 4 + 1  # of each block, and of patch merging
    for name, (x, turned) in seen.items():
        rows = turned.reshape(-1, turned.shape[-1])
        assert rows.mean(0).abs().max() < 1e-4 * rows.abs().max(), name
        assert x.shape == turned.shape


@pytest.mark.parametrize('batch_size', [1, 2])
def test_batches_do_not_change_the_rotation(batch_size, images):
    one, other = rotated(swin()), rotated(swin())
    other.load_state_dict(one.state_dict())  # the weights
    psaq_mm.calibrate(one, images, batch_size=5)
    psaq_mm.calibrate(other, images, batch_size=batch_size)
    for (name, first), (_, second) in zip(named_rotations(one), named_rotations(other)):
        torch.testing.assert_close(first.mean, second.mean, rtol=1e-4, atol=1e-5, msg=name)


def test_inputs_are_rotated_once(images):
    student = rotated(swin(), images)
    before = {name: rotation.mean.clone() for name, rotation in named_rotations(student)}
    weights = {name: op.weight.clone() for name, op in named_quant_ops(student)
               if isinstance(op, QuantLinear)}
    psaq_mm.calibrate(student, 2 * images)
    assert all(torch.equal(r.mean, before[name]) for name, r in named_rotations(student))
    assert all(torch.equal(student.get_submodule(n).weight, w) for n, w in weights.items())


def test_rotated_weights_learn_or_not_as_before(images):
    model = swin()
    model.norm0.weight.requires_grad_(False)
    model.stages[0].blocks[0].ffn.layers[1].weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    after = {name: p.requires_grad for name, p in rotated(model, images).named_parameters()}
    assert {name: after[name] for name in before} == before
    assert after['stages.0.downsample.reduction.bias']


def test_rotation_of_values_that_are_not_finite(images):
    student = rotated(swin())
    images[2] = math.nan
    with pytest.raises(UserError, match=r'attn.w_msa.qkv \(input\): it holds NaN or infinite'):
        psaq_mm.calibrate(student, images)
    assert not any(rotation.active for _, rotation in named_rotations(student))


def test_rotation_of_a_layer_that_nothing_reaches():
    net = nn.Sequential(nn.Linear(4, 4))
    net.add_module('idle', nn.Linear(4, 4))
    spec = dict(input=QuantSpec(8, False, rotate=True))
    apply_plan(net, {'0': spec, 'idle': spec})
    with pytest.raises(ValueError, match=r'^idle \(input\): '):
        calibrate_ranges(net, torch.randn(2, 4), lambda batch: net[0](batch))
    assert not net[0].rotation.active


def test_rotated_student_has_its_teacher(images):
    model, other = swin(), swin()
    student = rotated(model, images)
    require_teacher_of(student, model)
    with pytest.raises(UserError, match='is not the float model of the student'):
        require_teacher_of(student, other)
    other.load_state_dict(model.state_dict())
    require_teacher_of(student, other)
    with torch.no_grad():
        other.stages[1].blocks[0].attn.w_msa.qkv.weight[3, 2] += 0.1
    with pytest.raises(UserError, match='stages.1.blocks.0.attn.w_msa.qkv.weight differs'):
        require_teacher_of(student, other)


def test_weight_that_is_not_finite(images):
    """The last range that is set: all before it are taken back."""
    model = plain_student(swin())
    model.stages[1].blocks[1].ffn.layers[1].weight.data[3, 2] = math.nan
    before = state_of(model)
    with pytest.raises(ValueError, match=r'^stages.1.blocks.1.ffn.layers.1 \(weight\): .*NaN or'):
        calibrate_ranges(model, images, lambda batch: model(batch))
    assert_left_alone(model, before)


def test_quantizer_that_sees_nothing():

    class Twins(nn.Module):

        def __init__(self):
            super().__init__()
            self.backbone = swin()
            self.unused = nn.Linear(2, 2)

    model = plain_student(Twins(), scope='model')
    before = state_of(model)
    with pytest.raises(ValueError, match=r'^unused \(input\): no values were observed'):
        calibrate_ranges(model, torch.randn(1, 3, 56, 56), model.backbone)
    assert_left_alone(model, before)


def test_other_errors_pass_through(images, student):
    before = state_of(student)

    def fail(batch):
        student(batch)
        raise ValueError('of the caller')

    with pytest.raises(ValueError, match='^of the caller$'):
        calibrate_ranges(student, images, fail)
    assert_left_alone(student, before)
    with pytest.raises(KeyboardInterrupt):
        calibrate_ranges(student, images, raise_interrupt)
    assert_left_alone(student, before)
    psaq_mm.calibrate(student, images)  # nothing stands in the way of another try
    assert all(q.active and not q.learned for _, q in named_quantizers(student))


def raise_interrupt(batch):
    raise KeyboardInterrupt


@pytest.mark.parametrize('shape', [(0, 3, 56, 56), (3, 56, 56), (1, 1, 3, 56, 56)])
def test_images_of_another_shape(shape):
    model = plain_student(swin())
    with pytest.raises(UserError, match=r'images of shape \(N, C, H, W\)'):
        psaq_mm.calibrate(model, torch.zeros(shape))


def test_no_quantized_modules(images):
    with pytest.raises(UserError, match='no quantized modules: call psaq_mm.prepare first'):
        psaq_mm.calibrate(swin(), images)


# Ranges are in the state dict


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize('load', [
    lambda model, state: model.load_state_dict(state),
    lambda model, state: model.load_state_dict(saved(state)),
    lambda model, state: load_state_dict(model, saved(state), strict=True)],
    ids=['torch', 'file', 'mmengine'])
@pytest.mark.parametrize('values', [
    dict(weight=dict(bits=4), activation=dict(bits=4)), dict(placement='v1'),
    dict(activation=dict(symmetric=True, granularity='per_channel'))])
def test_state_dict_says_that_a_model_quantizes(values, load, images):
    student = psaq_mm.calibrate(plain_student(swin(), **values), images)
    other = plain_student(swin(), **values)
    with torch.no_grad():
        expected, plain = student(images), other(images)
        load(other, student.state_dict())
        assert all(map(torch.equal, other(images), expected))
        assert not any(map(torch.equal, other(images), plain))
        load(other, plain_student(swin(), **values).state_dict())  # and that it does not
        assert not any(q.active for _, q in named_quantizers(other))


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
                                    lambda m: ExponentialMovingAverage(m).module],
                         ids=['deepcopy', 'pickle', 'average'])
def test_copies_quantize_too(copied, images):
    student = psaq_mm.calibrate(plain_student(swin(), activation=dict(bits=4)), images)
    with torch.no_grad():
        expected = student(images)
        twin = copied(student)
        twin.eval()
        assert all(map(torch.equal, twin(images), expected))


def test_quantizer_alone():
    """Hand values: [-1, 3] over 255 steps has its zero at 64."""
    quantizer = Quantizer(psaq_mm.quantization.QuantSpec(symmetric=False))
    quantizer.start_observing()
    quantizer(torch.tensor([[-1., 0.], [2., 3.]]))
    quantizer.finish_observing()
    assert float(quantizer.scale) == pytest.approx(4 / 255)
    assert float(quantizer.zero_point) == 64.


def test_range_of_pixels_holds_black_and_white():
    """Whatever the images are: photographs of dark scenes are black for the most part."""
    grey = torch.rand(2, 3, 64, 64) * 0.1
    student = plain_student(detector(), grey)
    low, high = student.backbone.patch_embed.projection.quantizers['input'].range()
    preprocessor = student.data_preprocessor
    darkest, brightest = ((value - preprocessor.mean) / preprocessor.std
                          for value in (0, 255))
    step = (high - low) / 255
    assert low == pytest.approx(float(darkest.min()), abs=float(step))
    assert high == pytest.approx(float(brightest.max()), abs=float(step))


def test_range_of_pixels_follows_the_images_where_nothing_says_how_they_are_normalized():
    images = torch.rand(2, 3, 56, 56)
    student = plain_student(swin())
    psaq_mm.calibrate(student, images)
    low, high = student.patch_embed.projection.quantizers['input'].range()
    assert -0.01 <= low <= 0 and 0.9 < high < 1.1

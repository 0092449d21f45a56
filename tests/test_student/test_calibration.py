# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import math

import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer
from torch import nn

import psaq_mm
from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops, set_quantization
from psaq_mm.quantization import Quantizer
from psaq_mm.student import calibrate_ranges


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
    model = psaq_mm.quantize(swin(), placement=placement, activation=dict(
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
    model = psaq_mm.quantize(swin())
    for size in (1, 2, 5, 8):
        psaq_mm.calibrate(model, images, batch_size=size)
        results.append(ranges(model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-7, msg=name)


def test_batches_and_progress(images):
    model = psaq_mm.quantize(swin())
    sizes, done = [], []
    calibrate_ranges(model, images, lambda batch: (sizes.append(len(batch)), model(batch)),
                     batch_size=2, progress=done.append)
    assert sizes == done == [2, 2, 1]


def test_float_activations_are_observed(images):
    """A second calibration, of a model switched on, sets the same ranges."""
    model = psaq_mm.quantize(swin(), activation=dict(bits=2))
    psaq_mm.calibrate(model, images)
    first = ranges(model)
    psaq_mm.calibrate(model, images)
    assert all(torch.equal(value, first[name]) for name, value in ranges(model).items())


def test_afterwards(images):
    model = psaq_mm.quantize(swin())
    weights = {n: q.scale.clone() for n, q in named_quantizers(model) if 'weight' in n}
    model.train()
    model.patch_embed.eval()
    before = {m: m.training for m in model.modules()}
    psaq_mm.calibrate(model, images)
    assert {m: m.training for m in model.modules()} == before
    for name, quantizer in named_quantizers(model):
        assert quantizer.observer is None and quantizer.calibrated and quantizer.enabled
        assert not quantizer._forward_hooks and not quantizer._forward_pre_hooks
        assert name not in weights or torch.equal(quantizer.scale, weights[name])


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('index', [0, 3])
def test_images_that_are_not_finite(value, index, images):
    images[index, 1, 5, 5] = value
    model = psaq_mm.quantize(swin())
    with pytest.raises(UserError, match=r'calibration failed: patch_embed.projection \(input\): '
                                        '.*NaN or infinite'):
        psaq_mm.calibrate(model, images, batch_size=2)
    for _, quantizer in named_quantizers(model):
        assert quantizer.observer is None and not quantizer.enabled
        assert not quantizer._forward_hooks and not quantizer._forward_pre_hooks


def test_activations_that_are_not_finite(images):
    model = psaq_mm.quantize(swin())
    model.stages[1].blocks[0].norm2.weight.data[3] = math.inf
    with pytest.raises(UserError, match=r'stages.1.blocks.0.ffn.layers.0.0 \(input\): '):
        psaq_mm.calibrate(model, images)


def test_quantizer_that_sees_nothing():

    class Twins(nn.Module):

        def __init__(self):
            super().__init__()
            self.backbone = swin()
            self.unused = nn.Linear(2, 2)

    model = psaq_mm.quantize(Twins(), scope='model')
    with pytest.raises(ValueError, match=r'^unused \(input\): no values were observed'):
        calibrate_ranges(model, torch.randn(1, 3, 56, 56), model.backbone)
    assert all(q.observer is None and not q.enabled for _, q in named_quantizers(model))


def test_other_errors_pass_through(images):
    model = psaq_mm.quantize(swin())

    def fail(batch):
        model(batch)
        raise ValueError('of the caller')

    with pytest.raises(ValueError, match='^of the caller$'):
        calibrate_ranges(model, images, fail)
    with pytest.raises(KeyboardInterrupt):
        calibrate_ranges(model, images, raise_interrupt)
    for _, quantizer in named_quantizers(model):
        assert quantizer.observer is None and not quantizer.enabled
        assert not quantizer._forward_hooks and not quantizer._forward_pre_hooks


def raise_interrupt(batch):
    raise KeyboardInterrupt


@pytest.mark.parametrize('shape', [(0, 3, 56, 56), (3, 56, 56), (1, 1, 3, 56, 56)])
def test_images_of_another_shape(shape):
    model = psaq_mm.quantize(swin())
    with pytest.raises(UserError, match=r'images of shape \(N, C, H, W\)'):
        psaq_mm.calibrate(model, torch.zeros(shape))


def test_no_quantized_modules(images):
    with pytest.raises(UserError, match='no quantized modules: call psaq_mm.quantize first'):
        psaq_mm.calibrate(swin(), images)


def test_quantizer_alone():
    """Hand values: [-1, 3] over 255 steps has its zero at 64."""
    quantizer = Quantizer(psaq_mm.quantization.QuantSpec(symmetric=False))
    quantizer.start_observing()
    quantizer(torch.tensor([[-1., 0.], [2., 3.]]))
    quantizer.finish_observing()
    assert float(quantizer.scale) == pytest.approx(4 / 255)
    assert float(quantizer.zero_point) == 64.

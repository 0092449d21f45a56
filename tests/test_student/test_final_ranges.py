# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Ranges brought from the size that was learnt at to another."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.backbones.swin import SwinTransformer
from torch import nn

import psaq_mm
from psaq_mm.errors import UserError
from psaq_mm.ops import apply_plan, named_quant_ops, quantization_enabled
from psaq_mm.quantization import QuantSpec
from psaq_mm.student import calibrate_ranges, carry_ranges_over
from psaq_mm.student.final_ranges import activation_ranges, carry_over
from psaq_mm.synthesis import mosaics

ENDS = st.floats(-100, 100).map(lambda x: round(x, 3))


def numbers(*values):
    return [torch.tensor(value) for value in values]


# One end


@pytest.mark.parametrize('learnt, before, after, expected', [
    (2., 1., 3., 6.), (-2., -4., -1., -0.5), (0.5, 1., 1., 0.5),
    (2., 0., 3., 3.), (2., 0., 1., 2.), (-2., 0., -3., -3.), (2., 1., 0., 2.),
    (2., -1., 3., 3.), (2., 1., -3., -3.), (0., 1., 2., 0.), (0., 0., 0., 0.)])
def test_carry_over_by_hand(learnt, before, after, expected):
    assert float(carry_over(*numbers(learnt, before, after))) == pytest.approx(expected)


def test_carry_over_of_many_ends():
    learnt, before, after = numbers([2., 2., -2.], [1., 0., -4.], [3., 1., -1.])
    assert carry_over(learnt, before, after).tolist() == [6., 2., -0.5]


@given(learnt=ENDS, before=ENDS, after=ENDS)
@settings(deadline=None, max_examples=200)
def test_carry_over(learnt, before, after):
    moved = float(carry_over(*numbers(learnt, before, after)))
    if before * after > 0:
        assert moved == pytest.approx(learnt * after / before, rel=1e-5, abs=1e-6)
    else:
        assert abs(moved) == pytest.approx(max(abs(learnt), abs(after)))
    # What did not differ from the rule does not differ from it afterwards.
    assert float(carry_over(*numbers(before, before, after))) == pytest.approx(
        after if before * after > 0 else max(before, after, key=abs), rel=1e-5, abs=1e-5)


# All ranges of a model


def network(granularity='per_tensor', symmetric=False):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 4, 1))
    specs = dict(weight=QuantSpec(8, True, 'per_channel'),
                 input=QuantSpec(8, symmetric, granularity))
    apply_plan(net, {'0': specs, '2': specs})
    return net


def ranges(model, weights=False):
    return {f'{name}.{role}': torch.stack(quantizer.range()).detach().clone()
            for name, op in named_quant_ops(model) for role, quantizer in op.quantizers.items()
            if (role == 'weight') is weights}


def assert_close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name],
                                   **(tolerance or dict(rtol=1e-4, atol=1e-5)))


def assert_half(halved, whole):
    """Ends are half as far from 0, but for the zero point's rounding."""
    assert halved.keys() == whole.keys()
    for name in halved:
        step = (whole[name][1] - whole[name][0]) / 255
        assert ((halved[name] - 0.5 * whole[name]).abs() <= 0.51 * step).all()


@pytest.fixture
def images():
    return torch.randn(6, 3, 16, 16)


@pytest.fixture
def others():
    return 2.5 * torch.randn(2, 3, 32, 24) + 0.5


@pytest.mark.parametrize('granularity', ['per_tensor', 'per_channel'])
@pytest.mark.parametrize('symmetric', [False, True])
def test_unlearnt_ranges_become_those_of_the_rule(granularity, symmetric, images, others):
    model = network(granularity, symmetric)
    calibrate_ranges(model, images, model)
    expected = copy.deepcopy(model)
    calibrate_ranges(expected, others, expected)
    before = ranges(model)
    carry_ranges_over(model, images, others, model, 4)
    assert_close(ranges(model), ranges(expected))
    assert all((after[1] > 1.5 * before[name][1]).any() for name, after in ranges(model).items())


@pytest.mark.parametrize('symmetric', [False, True])
def test_learnt_ranges_keep_their_share(symmetric, images, others):
    """Half of the rule's at one size is half of the rule's at the other."""
    model = network('per_tensor', symmetric)
    calibrate_ranges(model, images, model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for _, op in named_quant_ops(model):
            op.quantizers['input'].scale *= 0.5
            op.quantizers['weight'].scale *= 0.7
            op.weight += 1e-3 * torch.randn_like(op.weight)
        for op, other in zip((model[0], model[2]), (expected[0], expected[2])):
            other.weight.copy_(op.weight)
    weights = ranges(model, weights=True)
    calibrate_ranges(expected, others, expected)
    carry_ranges_over(model, images, others, model, 4)
    assert_half(ranges(model), ranges(expected))
    assert_close(ranges(model, weights=True), weights, rtol=0., atol=0.)  # these stay
    assert all(q.enabled for _, op in named_quant_ops(model) for q in op.quantizers.values())


def test_same_size_changes_nothing(images):
    model = network()
    calibrate_ranges(model, images, model)
    with torch.no_grad():
        model[0].quantizers['input'].scale *= 0.6
    before = ranges(model)
    carry_ranges_over(model, images, images, model, 4)
    assert_close(ranges(model), before)


def test_batches_have_as_many_pixels(images, others):
    model, shapes = network(), []
    calibrate_ranges(model, images, model)
    others = others.repeat(3, 1, 1, 1)  # 6 images of thrice the area

    def forward(batch):
        shapes.append(tuple(batch.shape))
        model(batch)

    carry_ranges_over(model, images, others, forward, 4)
    assert shapes == [(4, 3, 16, 16), (2, 3, 16, 16)] + [(1, 3, 32, 24)] * 6
    shapes.clear()
    carry_ranges_over(model, images, others[..., :16, :8], forward, 2)
    assert shapes == [(2, 3, 16, 16)] * 3 + [(4, 3, 16, 8), (2, 3, 16, 8)]


def test_activation_ranges(images):
    model = network()
    calibrate_ranges(model, images, model)
    found = activation_ranges(model)
    assert set(found) == {model[0].quantizers['input'], model[2].quantizers['input']}
    low, high = found[model[0].quantizers['input']]
    step = float(images.max() - images.min()) / 255
    assert float(low) == pytest.approx(float(images.min()), abs=0.51 * step)
    assert float(high) == pytest.approx(float(images.max()), abs=0.51 * step)


# Through the interface


@pytest.fixture
def swin():
    model = SwinTransformer(embed_dims=8, depths=(1, 1), num_heads=(1, 2), strides=(4, 2),
                            out_indices=(0, 1))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return psaq_mm.quantize(model)


@pytest.fixture
def squares():
    return torch.randn(4, 3, 56, 56)


@pytest.mark.parametrize('size', [(56, 56), (80, 112)])
def test_refit_sets_the_ranges_anew(size, swin, squares):
    """Where none were learnt they are those of a calibration on the mosaics."""
    psaq_mm.calibrate(swin, squares)
    expected = copy.deepcopy(swin)
    with torch.no_grad():
        for _, op in named_quant_ops(swin):
            if 'input' in op.quantizers:
                op.quantizers['input'].scale *= 0.5
    counts = []
    assert psaq_mm.refit(swin, squares, size, progress=counts.append, batch_size=2) is swin
    assert sum(counts) == len(mosaics(squares, size)) and len(counts) > 1
    psaq_mm.calibrate(expected, mosaics(squares, size))
    assert_close(ranges(swin), ranges(expected), rtol=1e-6, atol=1e-7)


def test_refit_on_values_that_are_not_finite(swin, squares):
    psaq_mm.calibrate(swin, squares)
    squares[0, 1, 5, 5] = float('nan')
    with pytest.raises(UserError, match='calibration failed: .*NaN or infinite'):
        psaq_mm.refit(swin, squares, (80, 112), learnt=True)


def test_refit_of_learnt_ranges(swin, squares):
    psaq_mm.calibrate(swin, squares)
    expected = copy.deepcopy(swin)
    with torch.no_grad():
        for _, op in named_quant_ops(swin):
            for role, quantizer in op.quantizers.items():
                if role != 'weight':
                    quantizer.scale *= 0.5
    learnt = ranges(swin)
    swin.train()
    swin.patch_embed.eval()
    modes = {m: m.training for m in swin.modules()}
    psaq_mm.refit(swin, squares, (56, 56), learnt=True)  # they are of that size already
    assert_close(ranges(swin), learnt, rtol=0., atol=0.)
    counts = []
    psaq_mm.refit(swin, squares, (80, 112), learnt=True, progress=counts.append, batch_size=2)
    assert sum(counts) == len(squares) + len(mosaics(squares, (80, 112)))
    psaq_mm.calibrate(expected, mosaics(squares, (80, 112)))
    assert_half(ranges(swin), ranges(expected))
    assert {m: m.training for m in swin.modules()} == modes
    assert all(p.requires_grad for p in swin.parameters())
    images = torch.randn(1, 3, 80, 112)
    swin.eval()
    with torch.no_grad():
        quantized = swin(images)
        with quantization_enabled(swin, False):
            plain = swin(images)
    assert not any(torch.equal(*pair) for pair in zip(quantized, plain))

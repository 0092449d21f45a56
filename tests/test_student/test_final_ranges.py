# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Ranges brought from the size that was learned at to another."""
import copy

import pytest
import torch
from conftest import plain_student
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.backbones.swin import SwinTransformer
from torch import nn

import psaq_mm
from psaq_mm.errors import UserError
from psaq_mm.ops import apply_plan, named_quant_ops, quantization_enabled
from psaq_mm.quantization import QuantSpec
from psaq_mm.student import calibrate_ranges, transfer_learned_ranges
from psaq_mm.student.final_ranges import activation_ranges, transferred_end
from psaq_mm.synthesis import mosaics

ENDS = st.floats(-100, 100).map(lambda x: round(x, 3))


def numbers(*values):
    return [torch.tensor(value) for value in values]


# One end


@pytest.mark.parametrize('learned, before, after, expected', [
    (2., 1., 3., 6.), (-2., -4., -1., -0.5), (0.5, 1., 1., 0.5),
    (2., 0., 3., 3.), (2., 0., 1., 2.), (-2., 0., -3., -3.), (2., 1., 0., 2.),
    (2., -1., 3., 3.), (2., 1., -3., -3.), (0., 1., 2., 0.), (0., 0., 0., 0.)])
def test_transferred_end_by_hand(learned, before, after, expected):
    assert float(transferred_end(*numbers(learned, before, after))) == pytest.approx(expected)


def test_transferred_end_of_many_ends():
    learned, before, after = numbers([2., 2., -2.], [1., 0., -4.], [3., 1., -1.])
    assert transferred_end(learned, before, after).tolist() == [6., 2., -0.5]


@given(learned=ENDS, before=ENDS, after=ENDS)
@settings(deadline=None, max_examples=200)
def test_transferred_end(learned, before, after):
    moved = float(transferred_end(*numbers(learned, before, after)))
    if before * after > 0:
        assert moved == pytest.approx(learned * after / before, rel=1e-5, abs=1e-6)
    else:
        assert abs(moved) == pytest.approx(max(abs(learned), abs(after)))
    # What did not differ from the rule does not differ from it afterwards.
    assert float(transferred_end(*numbers(before, before, after))) == pytest.approx(
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
def test_unlearned_ranges_become_those_of_the_rule(granularity, symmetric, images, others):
    model = network(granularity, symmetric)
    calibrate_ranges(model, images, model)
    expected = copy.deepcopy(model)
    calibrate_ranges(expected, others, expected)
    before = ranges(model)
    transfer_learned_ranges(model, images, others, model, 4)
    assert_close(ranges(model), ranges(expected))
    assert all((after[1] > 1.5 * before[name][1]).any() for name, after in ranges(model).items())


@pytest.mark.parametrize('symmetric', [False, True])
def test_learned_ranges_keep_their_share(symmetric, images, others):
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
    transfer_learned_ranges(model, images, others, model, 4)
    assert_half(ranges(model), ranges(expected))
    assert_close(ranges(model, weights=True), weights, rtol=0., atol=0.)  # these stay
    assert all(q.active and q.learned is (role != 'weight') for _, op in named_quant_ops(model)
               for role, q in op.quantizers.items())
def test_same_size_changes_nothing(images):
    model = network()
    calibrate_ranges(model, images, model)
    with torch.no_grad():
        model[0].quantizers['input'].scale *= 0.6
    before = ranges(model)
    transfer_learned_ranges(model, images, images, model, 4)
    assert_close(ranges(model), before)


def test_batches_have_as_many_pixels(images, others):
    model, shapes = network(), []
    calibrate_ranges(model, images, model)
    others = others.repeat(3, 1, 1, 1)  # 6 images of thrice the area

    def forward(batch):
        shapes.append(tuple(batch.shape))
        model(batch)

    transfer_learned_ranges(model, images, others, forward, 4)
    assert shapes == [(4, 3, 16, 16), (2, 3, 16, 16)] + [(1, 3, 32, 24)] * 6
    shapes.clear()
    transfer_learned_ranges(model, images, others[..., :16, :8], forward, 2)
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
    return plain_student(model)


@pytest.fixture
def squares():
    return torch.randn(4, 3, 56, 56)


def learn(model):
    """Let the ranges of activations be half of the rule's, as if learned; gives the ranges."""
    with torch.no_grad():
        for _, op in named_quant_ops(model):
            for role, quantizer in op.quantizers.items():
                if role != 'weight':
                    quantizer.scale *= 0.5
                    quantizer.learned = True
    return ranges(model)


def assert_learned(model, learned):
    assert_close(ranges(model), learned, rtol=0., atol=0.)
    assert all(q.learned for _, op in named_quant_ops(model)
               for role, q in op.quantizers.items() if role != 'weight')


@pytest.mark.parametrize('size', [(56, 56), (80, 112)])
def test_recalibrate_sets_the_ranges_anew(size, swin, squares):
    """Where none were learned they are those of a calibration on the mosaics."""
    psaq_mm.calibrate(swin, squares)
    expected = copy.deepcopy(swin)
    with torch.no_grad():
        for _, op in named_quant_ops(swin):
            if 'input' in op.quantizers:
                op.quantizers['input'].scale *= 0.5
    counts = []
    assert psaq_mm.recalibrate(swin, squares, size, progress=counts.append, batch_size=2) is swin
    assert sum(counts) == len(mosaics(squares, size)) and len(counts) > 1
    psaq_mm.calibrate(expected, mosaics(squares, size))
    assert_close(ranges(swin), ranges(expected), rtol=1e-6, atol=1e-7)


def test_recalibrate_on_values_that_are_not_finite(swin, squares):
    psaq_mm.calibrate(swin, squares)
    learned = learn(swin)
    broken = squares.clone()
    broken[0, 1, 5, 5] = float('nan')
    with pytest.raises(UserError, match='calibration failed: .*NaN or infinite'):
        psaq_mm.recalibrate(swin, broken, (80, 112))
    assert_learned(swin, learned)


@pytest.mark.parametrize('call', [1, 3, 5])
def test_interrupted_recalibration_keeps_what_was_learned(call, swin, squares):
    """In the pass at the one size, and in that at the other."""
    psaq_mm.calibrate(swin, squares)
    learned, calls = learn(swin), []

    def interrupt(count):
        calls.append(count)
        if len(calls) == call:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        psaq_mm.recalibrate(swin, squares, (80, 112), 1, interrupt)
    assert_learned(swin, learned)


def test_recalibrate_of_learned_ranges(swin, squares):
    psaq_mm.calibrate(swin, squares)
    expected = copy.deepcopy(swin)
    learned = learn(swin)
    swin.train()
    swin.patch_embed.eval()
    modes = {m: m.training for m in swin.modules()}
    psaq_mm.recalibrate(swin, squares, (56, 56))  # they are of that size already
    assert_learned(swin, learned)
    counts = []
    psaq_mm.recalibrate(swin, squares, (80, 112), progress=counts.append, batch_size=2)
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

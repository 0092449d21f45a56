# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Weights that learned nothing are rounded by what their layers are given."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psaq_mm.ops import apply_plan, named_quant_ops, ops_to_round, without_notes
from psaq_mm.quantization import QuantSpec, gptq_round, second_moments
from psaq_mm.student import calibrate_ranges, round_by_gptq
from psaq_mm.student import rounding as weight_rounding


def specs(bits=4, granularity='per_channel', **weight):
    return dict(weight=QuantSpec(bits, True, granularity, **dict(dict(rounding='gptq'), **weight)),
                input=QuantSpec(bits, False))


class Network(nn.Module):
    """A convolution, a transposed one, one with groups, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        x = self.grouped(self.up(self.conv(x).relu()).relu()).relu()
        return self.linear(x.mean((2, 3)))


def quantized(images, **changes):
    teacher = Network()
    model = copy.deepcopy(teacher)
    plan = {name: specs(**changes) for name in ('conv', 'up', 'grouped', 'linear')}
    apply_plan(model, plan)
    calibrate_ranges(model, images, model)
    return teacher, model


@pytest.fixture
def images():
    return torch.rand(6, 3, 12, 12) * torch.linspace(0.5, 2, 6).view(-1, 1, 1, 1)


def weights(model):
    return {name: op.weight.detach().clone() for name, op in named_quant_ops(model)}


@pytest.mark.parametrize('granularity', ['per_channel', 'per_tensor'])
def test_equals_the_layer_worked_out_by_itself(granularity, images):
    """The convolution's inputs are known: quantized images."""
    _, model = quantized(images, granularity=granularity)
    op = model.conv
    before, quantizer = op.weight.detach().clone(), op.weight_quantizer
    patches = F.unfold(op.quantizers['input'](images), 3, padding=1, stride=2)
    scale = quantizer.scale.expand(8)
    expected = gptq_round(before.flatten(1), second_moments(patches.transpose(1, 2).flatten(0, 1)),
                          scale, torch.zeros(8), (-7, 7)).view_as(before)
    round_by_gptq({'conv': op}, images, model)
    assert torch.equal(op.weight, expected)
    assert not torch.equal(quantizer(before), op.weight)
    assert torch.equal(quantizer(op.weight), op.weight)  # on its integers


def test_transposed_convolution_keeps_its_axes(images):
    """Its output, on the inputs that it has, is closer than by rounding to nearest."""
    _, model = quantized(images)
    seen = []
    model.up.register_forward_pre_hook(
        lambda op, args: seen.append(op.quantizers['input'](args[0])))
    before = model.up.weight.detach().clone()
    model(images)
    round_by_gptq({'up': model.up}, images, model)

    def output(weight):
        return F.conv_transpose2d(seen[0], weight, stride=2)

    plain = (output(model.up.weight_quantizer(before)) - output(before)).square().sum()
    assert (output(model.up.weight) - output(before)).square().sum() < 0.8 * plain
    assert torch.equal(model.up.weight_quantizer(model.up.weight), model.up.weight)


def test_batches_do_not_matter_and_are_told(images):
    results, told = [], []
    for batch_size in (1, 4, 6):
        torch.manual_seed(0)
        _, model = quantized(images)
        round_by_gptq({'conv': model.conv}, images, model, batch_size, told.append)
        results.append(model.conv.weight.detach().clone())
    assert told == [1] * 6 + [4, 2] + [6]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize('items, limit', [(6, 6 * 3 * 144 * 9), (2, 3 * 3 * 144 * 9 - 1), (1, 1)])
def test_as_many_rows_at_a_time_as_memory_allows(items, limit, images, monkeypatch):
    """A pixel of the convolution's input stands in up to nine patches."""
    _, model = quantized(images)
    other = copy.deepcopy(model)
    round_by_gptq({'conv': other.conv}, images, other)
    sizes, rows = [], model.conv.input_rows
    monkeypatch.setattr(weight_rounding, 'MAX_ELEMENTS', limit)
    monkeypatch.setattr(model.conv, 'input_rows', lambda x: sizes.append(len(x)) or rows(x))
    round_by_gptq({'conv': model.conv}, images, model)
    assert sizes == [items] * (6 // items)
    torch.testing.assert_close(model.conv.weight, other.conv.weight)


def test_which_ops_are_rounded(images):
    model = quantized(images)[1]
    assert list(ops_to_round(model)) == ['conv', 'up', 'linear']
    assert [name for name, op in named_quant_ops(model) if op.awaits_gptq] == [
        'conv', 'up', 'grouped', 'linear']
    for op in (model.up, model.grouped):
        op.weight_settled = True  # it was learned
    assert list(ops_to_round(model)) == ['conv', 'linear']
    assert [name for name, op in named_quant_ops(model) if op.awaits_gptq] == [
        'conv', 'linear']
    before = weights(model)
    round_by_gptq(ops_to_round(model), images, model)
    assert ops_to_round(model) == {}  # rounded once
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]) is (name in ('up', 'grouped'))
    other = quantized(images, rounding='nearest')[1]
    assert not any(op.awaits_gptq for _, op in named_quant_ops(other))


def test_the_rest_is_left_alone(images):
    model = quantized(images)[1]
    before = weights(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    round_by_gptq({'linear': model.linear}, images, model)
    for name, op in named_quant_ops(model):
        assert torch.equal(op.weight, before[name]) == (name != 'linear')
    for key, value in without_notes(model.state_dict()).items():
        if key != 'linear.weight':
            assert torch.equal(value, state[key]), key
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_shared_module(images):
    """What it is given in both places counts."""
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
    model.append(model[0])
    apply_plan(model, {'0': specs()})
    x = images[:, 0]
    calibrate_ranges(model, x, model)
    op = model[0]
    before = op.weight.detach().clone()
    first = op.quantizers['input'](x).flatten(0, 1)
    second = op.quantizers['input'](op(x).relu()).flatten(0, 1)
    expected = gptq_round(before, second_moments(torch.cat([first, second])),
                          op.weight_quantizer.scale, torch.zeros(12), (-7, 7))
    assert list(ops_to_round(model)) == ['0']
    round_by_gptq(ops_to_round(model), x, model)
    torch.testing.assert_close(op.weight, expected)


def test_layer_that_is_given_nothing_rounds_to_nearest(images):
    _, model = quantized(images)
    before = model.linear.weight.detach().clone()
    round_by_gptq({'linear': model.linear}, images, lambda batch: model.conv(batch))
    assert torch.equal(model.linear.weight, model.linear.weight_quantizer(before))


def test_inputs_that_are_not_finite(images):
    _, model = quantized(images)
    before = weights(model)
    with pytest.raises(ValueError, match=r'up \(weight\): inputs of the layer are not finite'):
        round_by_gptq(ops_to_round(model), images,
                      lambda batch: model.up(model.conv(batch) * float('nan')))
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert not any(op.weight_settled for _, op in named_quant_ops(model))
    assert not any(m._forward_pre_hooks for m in model.modules())

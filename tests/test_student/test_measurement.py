# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import copy
import math

import pytest
import torch
from conftest import plain_student
from mmdet.models.backbones.swin import SwinTransformer
from torch import nn

import psaq_mm
from psaq_mm.adapters import TapRecord
from psaq_mm.ops import apply_plan, named_quant_ops
from psaq_mm.quantization import Quantizer, QuantSpec
from psaq_mm.student import measure_each_alone, measure_sqnr, quantized_alone


def quantized(model, *names, bits=4):
    spec = QuantSpec(bits=bits)
    apply_plan(model, {name: dict(weight=spec) for name in names})
    for _, op in named_quant_ops(model):
        op.set_weight_range()
    return model


def linear():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[7., 2.4], [-7., 0.25]]))
    return quantized(model, '0')


def test_single_linear_by_hand():
    """4 bits and a largest weight of 7 make the scale 1: the weights become
    [[7, 2], [-7, 0]], and the output is off by 0.4 and 0.25 times x."""
    images = torch.tensor([[1., 2.], [3., -1.]])
    signal = (7 + 4.8)**2 + (-7 + 0.5)**2 + (21 - 2.4)**2 + (-21 - 0.25)**2
    noise = 0.8**2 + 0.5**2 + 0.4**2 + 0.25**2
    model = linear()
    result = measure_sqnr(model, images, model)
    assert list(result) == ['0']
    assert result['0'] == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)


def test_error_of_earlier_modules_is_included():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[7., 2.4], [-7., 0.25]]))
        model[1].weight.copy_(torch.tensor([[7., 1.]]))  # exact at 4 bits
    quantized(model, '0', '1')
    result = measure_sqnr(model, torch.tensor([[1., 2.]]), model)
    signal, noise = (7 * 11.8 - 6.5)**2, (7 * 0.8 + 0.5)**2
    assert result['1'] == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)


def test_module_that_runs_twice():
    class Twice(nn.Module):

        def __init__(self):
            super().__init__()
            self.layer = linear()[0].float_module

        def forward(self, x):
            return self.layer(x) + self.layer(2 * x)

    images = torch.tensor([[1., 2.]])
    once, twice = linear(), quantized(Twice(), 'layer')
    # Both runs of the layer have the same ratio.
    assert measure_sqnr(twice, images, twice)['layer'] == pytest.approx(
        measure_sqnr(once, images, once)['0'], abs=1e-6)


def test_nothing_lost_is_infinite():
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[7.], [-2.]]))
    quantized(model, '0')
    assert measure_sqnr(model, torch.ones(2, 1), model) == {'0': math.inf}


def test_only_noise_is_minus_infinite():
    """As for :func:`psaq_mm.quantization.sqnr_db`: the float output is 0."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[7., 1.5]]))
    quantized(model, '0')
    images = torch.tensor([[-1.5, 7.]])
    assert measure_sqnr(model, images, model) == {'0': -math.inf}


def test_outputs_of_another_shape_are_left_out():

    class Selects(nn.Module):
        """Its second layer gets as many rows as the first one lets through."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)
            with torch.no_grad():
                self.first.weight.copy_(torch.tensor([[7., 0.4]]))

        def forward(self, x):
            y = self.first(x)
            return self.second(y[y > 0].unsqueeze(1))

    model = quantized(Selects(), 'first', 'second')
    result = measure_sqnr(model, torch.tensor([[[0., 1.], [1., 0.]]]), model)
    assert list(result) == ['first']


def test_switches_and_hooks_are_restored():
    model = SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                            out_indices=(0, 1))
    model.eval()
    images = torch.randn(2, 3, 56, 56)
    model = psaq_mm.calibrate(plain_student(model), images)
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    quantizers[3].enabled = quantizers[7].enabled = False
    before = [q.enabled for q in quantizers]
    result = measure_sqnr(model, images, model)
    assert set(result) == {name for name, _ in named_quant_ops(model)}
    assert all(20 < value < 100 for value in result.values())
    assert [q.enabled for q in quantizers] == before

    def fail(batch):
        raise RuntimeError('out of memory')

    with pytest.raises(RuntimeError, match='out of memory'):
        measure_sqnr(model, images, fail)
    assert [q.enabled for q in quantizers] == before
    assert not any(m._forward_hooks for m in model.modules())


def test_more_bits_are_better():
    images = torch.randn(1, 3, 56, 56)
    results = {}
    for bits in (4, 8):
        torch.manual_seed(0)
        model = SwinTransformer(embed_dims=16, depths=(1, 1), num_heads=(1, 2), strides=(4, 2),
                                out_indices=(0, 1))
        model.eval()
        model = plain_student(model, weight=dict(bits=bits), activation=dict(bits=bits))
        psaq_mm.calibrate(model, images)
        results[bits] = measure_sqnr(model, images, model)
    gains = [results[8][name] - results[4][name] for name in results[8]
             if name != 'patch_embed.projection']  # 8 bits in both
    assert all(15 < gain < 35 for gain in gains), gains  # 4 bits are 24 dB


def two_layers():
    """A student of two layers, 4 bits, and the float model that it is a copy of."""
    teacher = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        teacher[0].weight.copy_(torch.tensor([[7., 2.4], [-7., 0.25]]))
        teacher[1].weight.copy_(torch.tensor([[7., 1.6]]))
    return quantized(copy.deepcopy(teacher), '0', '1'), teacher


def run(model, image, regions):
    return TapRecord({'a.0': model(image), 'a.1': 2 * model(image), 'a.2': image[:, :0]})


def test_sensitivity_by_hand():
    """The weights become [[7, 2], [-7, 0]] and [[7, 2]]; for x = (1, 2) the hidden values are
    11.8 and -6.5, and the output is 72.2."""
    student, teacher = two_layers()
    groups = {'first': ['0'], 'second': ['1'], 'both': ['0', '1'], 'none': []}
    found = measure_each_alone(student, teacher, torch.tensor([[1., 2.]]), groups, run)
    output = 7 * 11.8 - 1.6 * 6.5
    expected = dict(first=7 * 0.8 + 1.6 * 0.5, second=0.4 * 6.5, none=0.)
    expected['both'] = output - (7 * 11 - 2 * 7)
    assert found == {name: pytest.approx(abs(error) / output, abs=1e-6)
                     for name, error in expected.items()}


def test_sensitivity_is_a_mean_over_images():
    student, teacher = two_layers()
    images = torch.tensor([[1., 2.], [3., -1.]])
    each = [measure_each_alone(student, teacher, image[None], {'': ['0']}, run)['']
            for image in images]
    both = measure_each_alone(student, teacher, images, {'': ['0']}, run)['']
    assert both == pytest.approx(math.sqrt((each[0]**2 + each[1]**2) / 2))


def test_rounded_weights_are_part_of_sensitivity():
    """GPTQ leaves a weight on its integers: with quantizers off a student is not in float."""
    student, teacher = two_layers()
    expected = measure_each_alone(student, teacher, torch.ones(1, 2), {'': ['0']}, run)
    with torch.no_grad():
        for _, op in named_quant_ops(student):
            op.weight.copy_(op.quantized_weight())
    parameters = dict(student.named_parameters())
    assert measure_each_alone(student, teacher, torch.ones(1, 2), {'': ['0']}, run) == expected
    assert all(parameters[name] is p for name, p in student.named_parameters())
    assert measure_sqnr(student, torch.ones(1, 2), student) == {'0': math.inf, '1': math.inf}
    against_float = measure_sqnr(student, torch.ones(1, 2), student, teacher)
    assert all(0 < value < 40 for value in against_float.values())


def test_alone_is_float_but_for_the_named_ops():
    student, teacher = two_layers()
    images, before = torch.randn(3, 2), student(torch.ones(1, 2))
    with quantized_alone(student, teacher):
        assert torch.equal(student(images), teacher(images))
    with pytest.raises(RuntimeError), quantized_alone(student, teacher, ['1']):
        hidden = student[0](images)
        assert torch.equal(hidden, teacher[0](images))
        assert not torch.equal(student[1](hidden), teacher[1](hidden))
        raise RuntimeError
    assert torch.equal(student(torch.ones(1, 2)), before)

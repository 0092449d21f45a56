# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One side of the game: a small quantized network that follows its float copy."""
import copy
import math

import pytest
import torch
from torch import nn

from psaq_mm.adapters import TapRecord
from psaq_mm.errors import UserError
from psaq_mm.evolution import StudentLearner
from psaq_mm.ops import apply_plan, named_quant_ops, without_notes
from psaq_mm.quantization import QuantSpec
from psaq_mm.recipe import EvolutionSettings
from psaq_mm.student import calibrate_ranges

SIZE = 28
RULES = dict(rounds=1, batch_size=4, weight_lr=0.01, range_lr=1e-2)


def network():
    """Convolution, BatchNorm, GELU, and a layer that stays float at its end."""
    generator = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, 6, 7, 7), nn.BatchNorm2d(6), nn.GELU(),
                        nn.Conv2d(6, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        for tensor in (*net.parameters(), net[1].running_mean):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return net.eval()


def quantized(net, images, bits=3):
    """A calibrated copy, whose last layer is float; ranges leave some values out."""
    student = copy.deepcopy(net)
    rule = dict(type='PercentileObserver', percentile=0.98)
    specs = dict(weight=QuantSpec(bits, True, 'per_channel'),
                 input=QuantSpec(bits, False, observer=rule))
    apply_plan(student, {'0': specs, '3': specs})
    calibrate_ranges(student, images, student)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    return student


def run_taps(net, images):
    middle = net[:3](images)
    return TapRecord({'backbone.0': middle, 'logits.0': net[3:](middle)})


def student_of(net, images, **rules):
    model = quantized(net, images)
    return StudentLearner(model, lambda batch, regions: run_taps(model, batch),
                   EvolutionSettings(**{**RULES, **rules}))


@pytest.fixture
def net():
    return network()


@pytest.fixture
def images():
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def teacher(net, images):
    with torch.no_grad():
        return run_taps(net, images)


def steps(student, teacher, images, count=1, factor=1.):
    student.require_grad(True)
    values = [student.step(teacher, images, factor, lambda: None) for _ in range(count)]
    student.require_grad(False)
    return values


def ranges(model):
    return {f'{name}.{role}.{end}': getattr(quantizer, end).detach().clone()
            for name, op in named_quant_ops(model) for role, quantizer in op.quantizers.items()
            for end in ('scale', 'zero_point')}


def tensors(model):
    """Parameters and buffers that are not ranges."""
    return {name: value.detach().clone()
            for name, value in without_notes(model.state_dict()).items()
            if '.quantizers.' not in name}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# What a step does


@pytest.mark.parametrize('learn', ['ranges', 'weights', 'both'])
def test_steps_lower_the_discrepancy(learn, net, teacher, images):
    student = student_of(net, images, learn=learn)
    values = steps(student, teacher, images, 40)
    with torch.no_grad():
        last = float(student.discrepancy(teacher, images).mean())
    assert last < 0.85 * values[0]
    assert sum(values[-5:]) < 0.9 * sum(values[:5])


def test_discrepancy_is_that_of_the_taps(net, teacher, images):
    student = student_of(net, images, taps=dict(backbone=2., logits=0.5))
    with torch.no_grad():
        taps = run_taps(student.model, images).taps
        value = student.discrepancy(teacher, images)
    expected = sum(weight * (teacher.taps[tap] - taps[tap]).abs().flatten(1).mean(1)
                   / (teacher.taps[tap].abs().flatten(1).mean(1) + 1e-6)
                   for tap, weight in (('backbone.0', 2.), ('logits.0', 0.5)))
    torch.testing.assert_close(value, expected)
    assert steps(student, teacher, images) == [pytest.approx(float(expected.mean()), rel=1e-5)]


LEARNED_WEIGHTS = {'0.weight', '0.bias', '3.weight', '3.bias'}
LEARNED_RANGES = {'0.weight.scale', '3.weight.scale', '0.input.scale', '3.input.scale',
                 '0.input.zero_point', '3.input.zero_point'}


@pytest.mark.parametrize('learn, weights, learned_ranges', [
    ('ranges', set(), LEARNED_RANGES), ('weights', LEARNED_WEIGHTS, set()),
    ('both', LEARNED_WEIGHTS, LEARNED_RANGES)])
def test_what_is_learned(learn, weights, learned_ranges, net, teacher, images):
    """That and nothing else: norms and float layers stay, statistics too."""
    student = student_of(net, images, learn=learn)
    before = tensors(student.model), ranges(student.model)
    steps(student, teacher, images, 3)
    assert changed(before[0], tensors(student.model)) == weights
    assert changed(before[1], ranges(student.model)) == learned_ranges


def test_first_step_is_the_learning_rate(net, teacher, images):
    """Adam's first step is of the size of lr times the factor: relative to the mean step
    between two integers of the layer's weight, and to each scale."""
    student = student_of(net, images, weight_lr=0.01, range_lr=1e-2)
    before, scales = tensors(student.model), ranges(student.model)
    steps(student, teacher, images, factor=0.5)
    for name in ('3.weight', '3.bias'):
        moved = tensors(student.model)[name] - before[name]
        expected = 0.5 * 0.01 * float(scales['3.weight.scale'].mean())
        assert float(moved.abs().median()) == pytest.approx(expected, rel=0.05)
    ratio = ranges(student.model)['3.weight.scale'] / scales['3.weight.scale']
    torch.testing.assert_close(ratio.log().abs(), torch.full((8, ), 5e-3), rtol=0.02, atol=0.)


def test_layers_of_more_bits_move_less(net, teacher, images):
    """As much less as their steps are smaller: 127 integers on a side instead of 3."""
    moved = []
    for bits in (3, 8):
        model = quantized(net, images, bits)
        student = StudentLearner(model, lambda batch, regions, model=model: run_taps(model, batch),
                          EvolutionSettings(**RULES))
        steps(student, teacher, images)
        moved.append(float((model[3].weight - net[3].weight).abs().median()))
    assert moved[0] / moved[1] == pytest.approx(127 / 3, rel=0.05)


def test_what_has_no_quantized_weight_stays(net, teacher, images):
    """There is no step that its learning rate could be relative to."""
    model = quantized(net, images)
    del model[3].quantizers['weight']
    student = StudentLearner(model, lambda batch, regions: run_taps(model, batch),
                      EvolutionSettings(**RULES))
    before = tensors(model)
    steps(student, teacher, images, 2)
    assert changed(before, tensors(model)) == {'0.weight', '0.bias'}


def test_nothing_to_learn(net, images):
    model = quantized(net, images)
    for _, op in named_quant_ops(model):
        del op.quantizers['weight']
    with pytest.raises(UserError, match="^evolution.learn='weights', but no weight is quantized"):
        StudentLearner(model, None, EvolutionSettings(**RULES, learn='weights'))
    assert not StudentLearner(model, None, EvolutionSettings(**RULES)).weights


def test_straight_through_gradient(net, teacher, images):
    """Of a bias, which no rounding follows, it is that of finite differences."""
    student = student_of(net, images, learn='weights', taps=dict(logits=1.))
    bias = student.model[3].bias
    student.require_grad(True)
    student.discrepancy(teacher, images).mean().backward()
    student.require_grad(False)
    for index in range(3):
        values = []
        for shift in (1e-3, -1e-3):
            with torch.no_grad():
                bias[index] += shift
                values.append(float(student.discrepancy(teacher, images).double().mean()))
                bias[index] -= shift
        assert float(bias.grad[index]) == pytest.approx((values[0] - values[1]) / 2e-3,
                                                        rel=0.05, abs=1e-3)


def test_gradients_are_asked_only_while_learning(net, images):
    student = student_of(net, images)
    learned = [*student.weights, *student.ranges.tensors]
    assert len(student.weights) == 4 and len(student.ranges.tensors) == 6
    for enabled in (True, False):
        student.require_grad(enabled)
        assert all(tensor.requires_grad is enabled for tensor in learned)
        assert not student.model[5].weight.requires_grad
        assert not student.model[1].weight.requires_grad


def test_no_gradient_is_left_behind(net, teacher, images):
    """Else the next step would add to it."""
    student = student_of(net, images)
    steps(student, teacher, images, 2)
    assert all(t.grad is None for t in (*student.weights, *student.ranges.tensors,
                                        student.ranges.offsets))


def test_shared_layers_are_learned_once(net, images):
    model = quantized(net, images)
    model.again = model[3]
    student = StudentLearner(model, lambda batch, regions: run_taps(model, batch),
                      EvolutionSettings(**RULES))
    assert len(student.weights) == 4
    assert len(student.ranges.tensors) == 6


def test_layer_without_a_gradient(net, teacher, images):
    """Such as a RoI head that saw no region: it stays."""
    student = student_of(net, images, taps=dict(backbone=1.))
    before = tensors(student.model)
    steps(student, teacher, images, 2)
    assert changed(before, tensors(student.model)) == {'0.weight', '0.bias'}


# What goes wrong


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_discrepancy_that_is_not_finite(value, net, teacher, images):
    """The student is then as before, and learns on as if nothing had been."""
    student, other = student_of(net, images), student_of(net, images)
    steps(student, teacher, images, 2)
    steps(other, teacher, images, 2)
    before = tensors(student.model), ranges(student.model)
    broken = TapRecord({name: value * tap for name, tap in teacher.taps.items()})
    with pytest.raises(FloatingPointError, match='the discrepancy is (nan|inf)'):
        steps(student, broken, images)
    student.require_grad(False)
    assert not changed(before[0], tensors(student.model))
    assert not changed(before[1], ranges(student.model))
    assert steps(student, teacher, images, 2) == steps(other, teacher, images, 2)


def test_gradient_that_is_not_finite(net, teacher, images):
    model, calls, told = quantized(net, images), [], []

    def forward(batch, regions):
        calls.append(len(batch))
        record = run_taps(model, batch)
        if len(calls) == 3:
            record.taps['logits.0'].register_hook(lambda grad: grad * math.nan)
        return record

    student, other = (StudentLearner(model, forward, EvolutionSettings(**RULES)),
                      student_of(net, images))
    steps(student, teacher, images, 2)
    steps(other, teacher, images, 2)
    before = tensors(model), ranges(model)
    student.require_grad(True)
    with pytest.raises(FloatingPointError, match='a gradient of the student is not finite'):
        student.step(teacher, images, 1., lambda: told.append(1))
    assert not told  # that the student changes
    student.require_grad(False)
    assert not changed(before[0], tensors(model)) and not changed(before[1], ranges(model))
    assert steps(student, teacher, images, 2) == steps(other, teacher, images, 2)


# State


@pytest.mark.parametrize('learn', ['ranges', 'weights', 'both'])
@pytest.mark.parametrize('count', [0, 1, 4])
def test_restored_student_gives_the_same_bits(learn, count, net, teacher, images):
    first = student_of(net, images, learn=learn)
    steps(first, teacher, images, count)
    state = copy.deepcopy(first.state_dict())
    second = student_of(net, images, learn=learn)
    steps(second, teacher, images, 2, factor=0.3)  # it comes from somewhere else
    second.load_state_dict(copy.deepcopy(state))
    for _ in range(3):
        assert not changed(tensors(first.model), tensors(second.model))
        assert not changed(ranges(first.model), ranges(second.model))
        assert steps(first, teacher, images) == steps(second, teacher, images)


def test_restore_goes_back(net, teacher, images):
    student = student_of(net, images)
    steps(student, teacher, images, 2)
    learned = student.learned()
    before = tensors(student.model), ranges(student.model)
    steps(student, teacher, images, 3)  # the copy does not follow
    assert changed(before[0], tensors(student.model)) == LEARNED_WEIGHTS
    student.restore(learned)
    assert not changed(before[0], tensors(student.model))
    assert not changed(before[1], ranges(student.model))

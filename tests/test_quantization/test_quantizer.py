# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The quantizer module: without a range, observing, with one, switched off, and its state."""
import copy
import pickle
import re

import pytest
import torch

from psaq_mm.errors import UserError
from psaq_mm.quantization import Quantizer, QuantSpec, fake_quantize
from psaq_mm.quantization.quantizer import INTEGERS

PER_CHANNEL = dict(granularity='per_channel')


def calibrated(x, axis=None, **spec):
    quantizer = Quantizer(QuantSpec(**spec), axis)
    quantizer.start_observing()
    quantizer(x)
    quantizer.finish_observing()
    return quantizer


def asked_for_gradients(quantizer):
    """As the game does with what it learns."""
    for tensor in (quantizer.scale, quantizer.zero_point):
        tensor.requires_grad_(True)
    return quantizer


def every_kind():
    return [dict(symmetric=symmetric, granularity=granularity)
            for symmetric in (True, False) for granularity in ('per_tensor', 'per_channel')]


def test_off_returns_the_very_same_object():
    x = torch.randn(3, 4)
    quantizer = Quantizer(QuantSpec())
    assert quantizer(x) is x
    quantizer.start_observing()
    assert quantizer(x) is x
    quantizer.finish_observing()
    assert quantizer(x) is not x
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True
    assert quantizer(x) is not x


def test_active_with_a_range_unless_switched_off():
    quantizer, x = Quantizer(QuantSpec(bits=4)), torch.tensor([-9., 0.3, 2.2])
    for enabled in (True, False):
        quantizer.enabled = enabled
        assert not quantizer.calibrated and not quantizer.active
        assert quantizer(x) is x
    quantizer.set_range(torch.tensor([-7.]), torch.tensor([7.]))
    assert quantizer.calibrated and not quantizer.active
    assert quantizer(x) is x
    quantizer.enabled = True
    assert quantizer.active
    assert quantizer(x).tolist() == [-7., 0., 2.]


def test_range_of_before():
    quantizer, x = calibrated(torch.tensor([-3.5, 2.]), bits=4, symmetric=False), torch.randn(9)
    assert not quantizer.learned
    quantizer.learned = True
    expected, before = quantizer(x), (quantizer.scale, quantizer.zero_point, quantizer.learned)
    quantizer.start_observing()
    quantizer(torch.tensor([-100., 1.]))
    quantizer.finish_observing()
    assert not quantizer.learned  # the rule's
    assert not torch.equal(quantizer(x), expected)
    quantizer.restore_range(*before)
    assert quantizer.learned and torch.equal(quantizer(x), expected)
    nothing = Quantizer(QuantSpec(bits=4, symmetric=False))
    quantizer.restore_range(nothing.scale, nothing.zero_point, False)
    assert not quantizer.calibrated and quantizer(x) is x


def test_observe_finish_range():
    quantizer = Quantizer(QuantSpec(bits=4, symmetric=False))
    quantizer.start_observing()
    for values in ([0.5, 2.], [-3., 1.], [4.5]):
        quantizer(torch.tensor(values))
    quantizer.finish_observing()
    assert quantizer.calibrated
    assert quantizer.observer is None
    assert (quantizer.scale.item(), quantizer.zero_point.item()) == (0.5, 6.)
    assert quantizer.scale.shape == quantizer.zero_point.shape == ()
    assert [end.item() for end in quantizer.range()] == [-3., 4.5]
    x = torch.tensor([-9., -0.3, 0., 0.3, 9.])
    assert quantizer(x).tolist() == [-3., -0.5, 0., 0.5, 4.5]
    assert quantizer.to_integers(x).tolist() == [0, 5, 6, 7, 15]


def test_symmetric_range():
    quantizer = calibrated(torch.tensor([-3.5, 2.]), bits=4)
    assert (quantizer.scale.item(), quantizer.zero_point.item()) == (0.5, 0.)
    assert [end.item() for end in quantizer.range()] == [-3.5, 3.5]


def test_observing_anew_forgets_the_old_range():
    quantizer = calibrated(torch.tensor([-100., 100.]))
    quantizer.start_observing()
    quantizer(torch.tensor([-1.27, 1.27]))
    quantizer.finish_observing()
    assert quantizer.scale.item() == pytest.approx(0.01)


def test_the_observer_sees_the_input_and_not_the_output():
    quantizer = calibrated(torch.tensor([-1., 1.]))
    quantizer.start_observing()
    assert quantizer(torch.tensor([5.])).item() == 1.  # clipped, as it is active
    quantizer.finish_observing()
    assert quantizer.range()[1].item() == pytest.approx(5.)


@pytest.mark.parametrize('axis', [0, 1, -1])
def test_per_channel(axis):
    x = torch.randn(3, 4, 5) * torch.arange(1., 61.).reshape(3, 4, 5)
    quantizer = calibrated(x, axis, bits=6, symmetric=False, **PER_CHANNEL)
    count = x.shape[axis]
    assert quantizer.scale.shape == quantizer.zero_point.shape == (count, )
    low, high = quantizer.range()
    y, integers = quantizer(x), quantizer.to_integers(x)
    for channel in range(count):
        part = x.select(axis, channel)
        alone = calibrated(part, bits=6, symmetric=False)
        assert torch.equal(alone(part), y.select(axis, channel))
        assert torch.equal(alone.to_integers(part), integers.select(axis, channel))
        assert [end.item() for end in alone.range()] == [low[channel].item(), high[channel].item()]


def test_axis_is_unused_per_tensor():
    x = torch.randn(3, 4)
    assert torch.equal(calibrated(x, 1)(x), calibrated(x)(x))


def test_per_channel_without_an_axis():
    with pytest.raises(ValueError, match='needs its channel axis'):
        Quantizer(QuantSpec(**PER_CHANNEL))


def test_rule_of_the_spec_is_used():
    x = torch.cat([torch.linspace(-1, 1, 10001), torch.tensor([50.])])
    quantizer = calibrated(x, observer=dict(type='PercentileObserver', percentile=0.99))
    assert quantizer.range()[1].item() == pytest.approx(0.99, abs=0.01)


def test_nothing_observed():
    quantizer = Quantizer(QuantSpec())
    with pytest.raises(ValueError, match='no values were observed'):
        quantizer.finish_observing()
    quantizer.start_observing()
    quantizer(torch.zeros(0, 3))
    with pytest.raises(ValueError, match='no values were observed'):
        quantizer.finish_observing()
    assert not quantizer.calibrated


# State

@pytest.mark.parametrize('kind', every_kind())
def test_ranges_are_buffers(kind):
    quantizer = calibrated(torch.randn(3, 4), 0, **kind)
    assert list(quantizer.parameters()) == []
    # The zero point of a symmetric range is 0 by definition and is not stored.
    assert set(quantizer.state_dict()) - {INTEGERS} == (
        {'scale'} if kind['symmetric'] else {'scale', 'zero_point'})
    assert {name for name, _ in quantizer.named_buffers()} == {'scale', 'zero_point'}


@pytest.mark.parametrize('kind', every_kind())
def test_state_dict_into_an_uncalibrated_quantizer(kind):
    """It quantizes from then on."""
    x = torch.randn(3, 4)
    source = calibrated(x, 0, bits=5, **kind)
    target = Quantizer(QuantSpec(bits=5, **kind), 0)
    assert not target.active
    target.load_state_dict(source.state_dict())
    assert target.active
    assert torch.equal(target(x), source(x))
    assert torch.equal(target.zero_point, source.zero_point)
    assert target.scale.data_ptr() != source.scale.data_ptr()
    assert {n for n, _ in target.named_buffers()} == {n for n, _ in source.named_buffers()}


def test_switch_is_no_state():
    source = calibrated(torch.randn(3, 4))
    source.enabled = False
    target = Quantizer(QuantSpec())
    target.load_state_dict(source.state_dict())
    assert target.active and not source.active


def test_state_dict_of_a_parent_module():
    x = torch.randn(3, 4)
    kinds = every_kind()
    source = torch.nn.ModuleDict({str(i): calibrated(x, 0, **k) for i, k in enumerate(kinds)})
    target = torch.nn.ModuleDict({str(i): Quantizer(QuantSpec(**k), 0)
                                  for i, k in enumerate(kinds)})
    result = target.load_state_dict(source.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name, quantizer in target.items():
        assert torch.equal(quantizer(x), source[name](x))


@pytest.mark.parametrize('kind', every_kind())
def test_state_dict_of_another_shape(kind):
    source, target = calibrated(torch.randn(3, 4), 0, **kind), calibrated(
        torch.randn(7, 4), 0, **kind)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(target(x), source(x))
    target.load_state_dict(Quantizer(QuantSpec(**kind), 0).state_dict())
    assert not target.calibrated


@pytest.mark.parametrize('own', [dict(bits=4), dict(bits=8, symmetric=False)])
def test_state_dict_for_other_integers(own):
    """The same numbers would stand for other values."""
    source = torch.nn.ModuleDict(dict(quantizers=torch.nn.ModuleDict(dict(
        weight=calibrated(torch.randn(3, 4), bits=8)))))
    target = torch.nn.ModuleDict(dict(qkv=torch.nn.ModuleDict(dict(
        quantizers=torch.nn.ModuleDict(dict(weight=Quantizer(QuantSpec(**own))))))))
    state = {f'qkv.{key}': value for key, value in source.state_dict().items()}
    kind = 'symmetric' if own.get('symmetric', True) else 'asymmetric'
    with pytest.raises(UserError, match=re.escape(
            'qkv (weight): the state dict is quantized to 8 bits (symmetric), the model to '
            f'{own["bits"]} bits ({kind})')):
        target.load_state_dict(state, strict=False)
    assert not target['qkv']['quantizers']['weight'].calibrated


def test_state_dict_of_a_version_that_does_not_say_for_which_integers():
    source, target = calibrated(torch.randn(3, 4), bits=5), Quantizer(QuantSpec(bits=5))
    state = source.state_dict()
    assert state.pop(INTEGERS).tolist() == [5, 1]
    target.load_state_dict(state)
    assert torch.equal(target.scale, source.scale)


@pytest.mark.parametrize('how', [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies(how):
    x = torch.randn(3, 4)
    source = calibrated(x, 0, symmetric=False, **PER_CHANNEL)
    source.learned = True
    expected = source(x)
    twin = how(source)
    assert twin.learned
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.scale.mul_(3)
    assert torch.equal(source(x), expected)
    assert not torch.equal(twin(x), expected)


def test_gradients_reach_ranges():
    x = torch.randn(3, 4)
    quantizer = asked_for_gradients(calibrated(x, bits=3, symmetric=False))
    with torch.no_grad():
        quantizer.scale.mul_(0.5)  # so that values clip at both ends
    quantizer(x).square().sum().backward()
    scale, zero_point = (t.detach().clone().requires_grad_()
                         for t in (quantizer.scale, quantizer.zero_point))
    fake_quantize(x, scale, zero_point, (0, 7)).square().sum().backward()
    assert scale.grad.abs() > 0 and zero_point.grad.abs() > 0
    assert torch.equal(quantizer.scale.grad, scale.grad)
    assert torch.equal(quantizer.zero_point.grad, zero_point.grad)


def test_a_learned_zero_point_is_used_as_an_integer():
    x = torch.linspace(-1, 1, 9)
    quantizer = asked_for_gradients(calibrated(x, bits=4, symmetric=False))
    x = x * 3  # clips at both ends
    expected, integers = quantizer(x).detach(), quantizer.to_integers(x)
    with torch.no_grad():
        quantizer.zero_point.add_(0.3)
    assert torch.equal(quantizer(x), expected)
    with torch.no_grad():
        assert torch.equal(quantizer(x), expected)
    assert torch.equal(quantizer.to_integers(x), integers)


def test_repr():
    assert repr(Quantizer(QuantSpec(4, False))) == 'Quantizer(bits=4, asymmetric, per_tensor)'
    assert repr(Quantizer(QuantSpec(**PER_CHANNEL), 0)) == (
        'Quantizer(bits=8, symmetric, per_channel)')


def test_half_precision_model_keeps_float32_ranges():
    quantizer = Quantizer(QuantSpec(8, False))
    quantizer.set_range(torch.tensor([0.]), torch.tensor([1e-6]))  # scale 4e-9: 0 in float16
    scale = quantizer.scale.clone()
    quantizer.half()
    assert quantizer.scale.dtype == torch.float32 and torch.equal(quantizer.scale, scale)


def test_range_set_in_inference_mode_can_be_loaded_over():
    quantizer = Quantizer(QuantSpec())
    with torch.inference_mode():
        quantizer.set_range(torch.tensor([-1.]), torch.tensor([1.]))
    other = Quantizer(QuantSpec())
    other.set_range(torch.tensor([-2.]), torch.tensor([2.]))
    quantizer.load_state_dict(other.state_dict())
    assert torch.equal(quantizer.scale, other.scale)

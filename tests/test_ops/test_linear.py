# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""QuantLinear against torch's fake quantize and F.linear."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import calibrated_op
from torch import nn

from psaq_mm.ops import QuantLinear, QuantOp, apply_plan, op_for, register_op, unwrap
from psaq_mm.quantization import QuantSpec

WEIGHT = QuantSpec(granularity='per_channel')
INPUT = QuantSpec(symmetric=False)


def calibrated(module, x, **specs):
    """A quantized op with ranges from ``x``."""
    return calibrated_op(QuantLinear.from_float(module, specs), x)


def ask_for_gradients(op):
    """As the game does with the ranges that it learns."""
    for quantizer in op.quantizers.values():
        quantizer.scale.requires_grad_(True)


def reference(x, bits, symmetric, axis=None):
    """Min-max fake quantization with torch's kernels and nothing of ours."""
    rows = x.detach().double()
    rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).flatten(1)
    low, high = rows.min(1).values.clamp(max=0), rows.max(1).values.clamp(min=0)
    if symmetric:
        qmin, qmax = 1 - 2**(bits - 1), 2**(bits - 1) - 1
        scale = (torch.maximum(-low, high) / qmax).float()
        zero_point = torch.zeros_like(scale)
    else:
        qmin, qmax = 0, 2**bits - 1
        scale = ((high - low) / qmax).float()
        zero_point = (-low / scale.double()).round()
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), qmin, qmax)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), axis % x.dim(), qmin,
                                                  qmax)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(6, 5), (2, 3, 5), (5, ), (2, 1, 3, 5)])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_equals_the_reference(bits, shape, bias):
    linear, x = nn.Linear(5, 7, bias=bias), torch.randn(shape)
    op = calibrated(linear, x, weight=QuantSpec(bits, True, 'per_channel'),
                    input=QuantSpec(bits, False))
    expected = F.linear(reference(x, bits, False), reference(linear.weight, bits, True, 0),
                        linear.bias)
    assert torch.equal(op(x), expected)
    with torch.no_grad():
        assert torch.equal(op(x), expected)
    assert not torch.equal(op(x), linear(x))


@pytest.mark.parametrize('weight, granularity', [
    (dict(symmetric=False), 'per_tensor'), (dict(symmetric=True), 'per_tensor'),
    (dict(symmetric=False), 'per_channel')
])
@pytest.mark.parametrize('input_granularity', ['per_tensor', 'per_channel'])
def test_granularity_and_symmetry(weight, granularity, input_granularity):
    linear, x = nn.Linear(5, 7), torch.randn(6, 5) * torch.arange(1., 6.)
    op = calibrated(linear, x, weight=QuantSpec(4, granularity=granularity, **weight),
                    input=QuantSpec(4, True, input_granularity))
    expected = F.linear(
        reference(x, 4, True, None if input_granularity == 'per_tensor' else -1),
        reference(linear.weight, 4, weight['symmetric'],
                  None if granularity == 'per_tensor' else 0), linear.bias)
    assert torch.equal(op(x), expected)


def test_each_role_alone():
    linear, x = nn.Linear(5, 7), torch.randn(6, 5)
    spec = QuantSpec(4, False)
    y = linear(x)
    assert torch.equal(calibrated(linear, x, weight=spec)(x),
                       F.linear(x, reference(linear.weight, 4, False), linear.bias))
    assert torch.equal(calibrated(linear, x, input=spec)(x),
                       F.linear(reference(x, 4, False), linear.weight, linear.bias))
    assert torch.equal(calibrated(linear, x, output=spec)(x), reference(y, 4, False))
    per_channel = QuantSpec(4, False, 'per_channel')
    assert torch.equal(calibrated(linear, x, output=per_channel)(x), reference(y, 4, False, -1))


def test_off_equals_float():
    linear, x = nn.Linear(5, 7), torch.randn(6, 5)
    op = QuantLinear.from_float(linear, dict(weight=WEIGHT, input=INPUT, output=INPUT))
    assert torch.equal(op(x), linear(x))
    assert op.quantized_weight() is linear.weight
    op = calibrated(linear, x, weight=WEIGHT, input=INPUT)
    assert not torch.equal(op(x), linear(x))
    for quantizer in op.quantizers.values():
        quantizer.enabled = False
    assert torch.equal(op(x), linear(x))


def test_is_a_linear_that_shares_its_weights():
    linear = nn.Linear(5, 7)
    keys = list(linear.state_dict())
    op = QuantLinear.from_float(linear, dict(weight=WEIGHT, input=INPUT))
    assert isinstance(op, nn.Linear) and isinstance(op, QuantOp)
    assert op.weight is linear.weight and op.bias is linear.bias
    assert (op.in_features, op.out_features) == (5, 7)
    assert op.float_module is linear
    assert list(linear.state_dict()) == keys
    assert not hasattr(linear, 'quantizers')
    # The float module is not a child: nothing of it is listed twice.
    assert {n for n, _ in op.named_parameters()} == {'weight', 'bias'}
    assert list(op.state_dict())[:3] == [*keys, 'quantizers.weight.scale']


def test_weight_range_is_set_apart_from_the_input_range():
    linear, x = nn.Linear(5, 7), torch.randn(6, 5)
    op = QuantLinear.from_float(linear, dict(weight=WEIGHT, input=INPUT))
    assert not any(q.calibrated for q in op.quantizers.values())
    op.set_weight_range()
    quantizer = op.weight_quantizer
    assert quantizer.calibrated and quantizer.observer is None
    assert quantizer.scale.shape == (7, )
    assert not op.quantizers['input'].calibrated
    expected = F.linear(x, reference(linear.weight, 8, True, 0), linear.bias)
    assert torch.equal(op(x), expected)


def test_op_without_a_quantized_weight():
    linear, x = nn.Linear(5, 7), torch.randn(6, 5)
    op = QuantLinear.from_float(linear, dict(input=INPUT))
    op.set_weight_range()
    assert op.weight_quantizer is None and not op.awaits_gptq
    assert torch.equal(op(x), linear(x))


def test_weight_that_is_not_finite():
    linear, x = nn.Linear(5, 7), torch.randn(6, 5)
    linear.weight.data[3, 2] = float('nan')
    op = QuantLinear.from_float(linear, dict(weight=WEIGHT))
    with pytest.raises(ValueError, match='NaN or infinite'):
        op.set_weight_range()
    assert not op.weight_quantizer.calibrated and op.weight_quantizer.observer is None
    assert torch.equal(op(x)[:, :3], linear(x)[:, :3])


@pytest.mark.parametrize('how', [lambda op: op, copy.deepcopy,
                                 lambda op: pickle.loads(pickle.dumps(op))])
def test_which_weights_await_gptq(how):
    asked, plain = (QuantLinear.from_float(nn.Linear(5, 7), dict(weight=QuantSpec(
        4, True, 'per_channel', rounding=rounding))) for rounding in ('gptq', 'nearest'))
    assert how(asked).awaits_gptq and not how(plain).awaits_gptq
    asked.set_weight_range()
    assert how(asked).awaits_gptq  # a range is not all
    asked.weight_settled = True
    assert how(asked).weight_settled and not how(asked).awaits_gptq


def test_empty_input():
    op = calibrated(nn.Linear(5, 7), torch.randn(6, 5), weight=WEIGHT, input=INPUT)
    assert op(torch.zeros(0, 5)).shape == (0, 7)


# The kept weight

def kept(bits=4):
    linear = nn.Linear(16, 16)
    op = calibrated(linear, torch.randn(6, 16), weight=QuantSpec(bits, True, 'per_channel'))
    with torch.no_grad():
        op.quantized_weight()
    return op


def assert_fresh(op):
    """The kept weight is what a new quantization gives."""
    with torch.no_grad():
        assert torch.equal(op.quantized_weight(), op.quantizers['weight'](op.weight))


def test_weight_is_kept_while_nothing_changes():
    op = kept()
    with torch.no_grad():
        first = op.quantized_weight()
        op(torch.randn(6, 16))
        assert op.quantized_weight() is first
    assert torch.equal(first, reference(op.weight, 4, True, 0))


@pytest.mark.parametrize('change', [
    lambda op: op.weight.copy_(torch.randn(16, 16)),
    lambda op: op.weight.detach().mul_(0.5),
    lambda op: op.load_state_dict({'weight': torch.randn(16, 16)}, strict=False),
    lambda op: torch.optim.SGD([op.weight], 1.).step(),
    lambda op: setattr(op, 'weight', nn.Parameter(torch.randn(16, 16))),
    lambda op: setattr(op.weight, 'data', torch.randn(16, 16)),
    lambda op: op.quantizers['weight'].scale.mul_(2),
    lambda op: op.quantizers['weight'].set_range(-torch.ones(16), torch.ones(16)),
])
def test_changes_are_noticed(change):
    op = kept()
    op.weight.grad = torch.randn(16, 16)
    with torch.no_grad():
        before = op.quantized_weight().clone()
        change(op)
    assert_fresh(op)
    with torch.no_grad():
        assert not torch.equal(op.quantized_weight(), before)


def test_zero_point_is_noticed():
    op = calibrated(nn.Linear(16, 16), torch.randn(6, 16), weight=QuantSpec(4, False))
    with torch.no_grad():
        before = op.quantized_weight().clone()
        op.quantizers['weight'].zero_point.add_(3)
        assert not torch.equal(op.quantized_weight(), before)
    assert_fresh(op)


@pytest.mark.parametrize('size', [16, 256])
def test_memory_that_is_used_again_is_noticed(size):
    # A tensor may lie where a freed one lay, at the same version.
    op = calibrated(nn.Linear(size, size), torch.randn(6, size), weight=WEIGHT)
    for step in range(10):
        with torch.no_grad():
            op.quantized_weight()
        for _ in range(2):
            op.weight.data = torch.randn(size, size)
        assert_fresh(op)
        for factor in (3, 7):
            op.quantizers['weight'].set_range(torch.full((size, ), -1. - step * factor),
                                              torch.full((size, ), 1. + step * factor))
        assert_fresh(op)


def test_type_of_the_weight_is_noticed():
    op = kept()
    op.double()
    assert_fresh(op)
    assert op(torch.randn(6, 16).double()).dtype == torch.float64


@pytest.mark.parametrize('how', [copy.deepcopy, lambda op: pickle.loads(pickle.dumps(op))])
def test_copies_stand_alone(how):
    op, x = kept(), torch.randn(6, 16)
    with torch.no_grad():
        expected = op(x)
        twin = how(op)
        assert torch.equal(twin(x), expected)
        twin.weight.mul_(-2)
        twin.quantizers['weight'].scale.mul_(2)
        assert torch.equal(twin.quantized_weight(), -2 * op.quantized_weight())
        assert torch.equal(op(x), expected)
    # The twin's float module is its own, and shares the twin's weight.
    assert twin.float_module is not op.float_module
    assert twin.float_module.weight is twin.weight
    assert twin.float_module.weight is not op.weight


def test_kept_weight_is_not_pickled():
    op = QuantLinear.from_float(nn.Linear(256, 256), dict(weight=WEIGHT))
    op.set_weight_range()
    empty = len(pickle.dumps(op))
    with torch.no_grad():
        op.quantized_weight()
    assert abs(len(pickle.dumps(op)) - empty) < 1000


def test_inference_mode():
    x = torch.randn(6, 5)
    linear = nn.Linear(5, 7).requires_grad_(False)
    with torch.inference_mode():  # made in it: such tensors have no version
        op = calibrated(linear, x, weight=WEIGHT, input=INPUT)
        expected = op(x)
    with torch.no_grad():
        assert torch.equal(op(x), expected)
    op = calibrated(linear, x, weight=WEIGHT, input=INPUT)
    with torch.inference_mode():  # kept in it, then used with gradients
        assert torch.equal(op(x), expected)
    leaf = x.clone().requires_grad_()
    op(leaf).sum().backward()
    assert torch.equal(leaf.grad, op.quantized_weight().sum(0).expand(6, 5))


# Gradients

@pytest.mark.parametrize('learned', [True, False])
def test_gradient_reaches_weight_and_input(learned):
    linear, x = nn.Linear(5, 7), torch.randn(6, 5)
    op = calibrated(linear, x, weight=QuantSpec(4, True, 'per_channel'),
                    input=QuantSpec(4, False))
    if learned:
        ask_for_gradients(op)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    op(ours).square().sum().backward()
    weight = linear.weight.detach().clone().requires_grad_()
    F.linear(reference(theirs, 4, False), reference(weight, 4, True, 0),
             linear.bias.detach()).square().sum().backward()
    assert torch.allclose(op.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_scales():
    linear, x = nn.Linear(5, 7), torch.randn(6, 5)
    op = calibrated(linear, x, weight=QuantSpec(4, True, 'per_channel'))
    ask_for_gradients(op)
    op(x).sum().backward()
    scale = op.quantizers['weight'].scale
    v = (linear.weight / scale[:, None]).detach()
    # LSQ; nothing clips in a min-max range. Upstream is the sum of x over the batch.
    expected = ((v.round() - v) * x.sum(0)).sum(1)
    assert torch.allclose(scale.grad, expected, rtol=1e-3, atol=1e-4)
    assert (scale.grad != 0).all()


def test_a_step_on_scales_changes_the_result():
    x = torch.randn(6, 5)
    op = calibrated(nn.Linear(5, 7), x, weight=QuantSpec(3, True, 'per_channel'),
                    input=QuantSpec(3, False))
    ask_for_gradients(op)
    with torch.no_grad():
        before = op(x)
    optimizer = torch.optim.SGD([q.scale for q in op.quantizers.values()], 0.01)
    loss = op(x).square().mean()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(op(x), before)
        assert op(x).square().mean() < loss


def test_frozen_weight_still_passes_gradients_to_the_input():
    x = torch.randn(6, 5)
    op = calibrated(nn.Linear(5, 7).requires_grad_(False), x, weight=WEIGHT)
    leaf = x.clone().requires_grad_()
    op(leaf).sum().backward()
    assert torch.allclose(leaf.grad, reference(op.weight, 8, True, 0).sum(0).expand(6, 5))
    assert op.weight.grad is None


# Registration

def test_replaces_this_class_and_no_subclass():

    class NormedLinear(nn.Linear):

        def forward(self, x):
            return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)

    assert op_for(nn.Linear(2, 2)) is QuantLinear
    assert op_for(NormedLinear(2, 2)) is None
    assert op_for(nn.LayerNorm(2)) is None


def test_register_op_for_another_class():

    class MyLinear(nn.Linear):
        pass

    assert register_op(MyLinear)(QuantLinear) is QuantLinear
    assert op_for(MyLinear(2, 2)) is QuantLinear
    assert op_for(nn.Linear(2, 2)) is QuantLinear


def test_unknown_role():
    with pytest.raises(KeyError):
        QuantLinear.from_float(nn.Linear(2, 2), dict(value=INPUT))


# Inputs that are rotated


ROTATED = QuantSpec(4, False, rotate=True)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(6, 12), (2, 3, 12), (12, )])
def test_rotated_input_by_hand(shape, bias):
    """Of blocks of four channels, about their means; the bias holds what the means give."""
    linear, x = nn.Linear(12, 7, bias=bias), torch.randn(shape) + 3
    mean = x.reshape(-1, 12).mean(0) if len(shape) > 1 else torch.randn(12)
    op = QuantLinear.from_float(linear, dict(weight=QuantSpec(4, True, 'per_channel'),
                                             input=ROTATED))
    assert torch.equal(op(x), linear(x))
    op.rotate_input(mean)
    torch.testing.assert_close(op(x), linear(x))
    calibrated_op(op, x)
    turn = torch.block_diag(*[torch.tensor([[1., 1., 1., 1.], [1., -1., 1., -1.],
                                            [1., 1., -1., -1.], [1., -1., -1., 1.]]) / 2] * 3)
    turn = torch.tensor([1., 1., 1., -1., 1., 1., -1., 1., 1., 1., 1., -1.]).diag() @ turn
    turned = (x - mean) @ turn
    expected = F.linear(reference(turned, 4, False), reference(linear.weight @ turn, 4, True, 0),
                        linear(mean))
    torch.testing.assert_close(op(x), expected)


def test_scales_of_rotated_tokens_by_hand():
    """The input is rotated first; the size is that of what comes out of it."""
    linear, x = nn.Linear(12, 7), torch.randn(2, 3, 12) * torch.tensor([1e-2, 1., 1e2])[:, None]
    spec = QuantSpec(4, False, 'per_token', rotate=True)
    op = QuantLinear.from_float(linear, dict(input=spec))
    op.rotate_input(torch.randn(12))
    calibrated_op(op, x)
    turned = op.rotation(x)
    sizes = turned.square().mean(-1, keepdim=True).sqrt()
    expected = F.linear(reference(turned / sizes, 4, False) * sizes, op.weight, op.bias)
    torch.testing.assert_close(op(x), expected)


def test_rotation_leaves_the_float_layer_and_those_that_share_its_weight():
    linear, other, x = nn.Linear(12, 7), nn.Linear(12, 7), torch.randn(3, 12)
    other.weight, other.bias = linear.weight, linear.bias
    expected = linear(x)
    op = QuantLinear.from_float(linear, dict(input=ROTATED))
    op.rotate_input(torch.randn(12))
    assert torch.equal(linear(x), expected) and torch.equal(other(x), expected)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('turned', [True, False])
def test_rotation_is_undone_with_the_op(turned, bias):
    net = nn.Sequential(nn.Linear(12, 7, bias=bias))
    x = torch.randn(3, 12)
    expected = net(x)
    apply_plan(net, {'0': dict(input=ROTATED)})
    if turned:
        net[0].rotate_input(torch.randn(12))
        with torch.no_grad():  # as GPTQ does
            net[0].weight.mul_(2)
            net[0].bias.mul_(2)
        expected = 2 * expected
    unwrap(net)
    assert type(net[0]) is nn.Linear
    torch.testing.assert_close(net(x), expected)
    assert turned or (net[0].bias is not None) == bias


def test_other_layers_keep_their_basis():
    op = op_for(nn.Conv2d(4, 4, 1)).from_float(nn.Conv2d(4, 4, 1), dict(input=ROTATED))
    assert not hasattr(op, 'rotation')

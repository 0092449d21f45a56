# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""QuantConv2d and QuantConvTranspose2d against torch's fake quantize and F."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import calibrated_op
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from mmcv.cnn.bricks.wrappers import ConvTranspose2d as MMCVConvTranspose2d
from mmcv.cnn.bricks.wrappers import Linear as MMCVLinear
from torch import nn

from psaq_mm.adapters import mmcv_layers  # noqa: F401 (registers what is tested)
from psaq_mm.ops import QuantConv2d, QuantConvTranspose2d, QuantLinear, op_for
from psaq_mm.quantization import QuantSpec


def calibrated(module, x, **specs):
    """A quantized op with ranges from ``x``."""
    return calibrated_op(QuantConv2d.from_float(module, specs), x)


def symmetric_per_channel(x, bits, axis):
    """Min-max, with torch's kernel."""
    top = 2**(bits - 1) - 1
    scale = x.detach().double().abs().amax([d for d in range(4) if d != axis]) / top
    return torch.fake_quantize_per_channel_affine(
        x, scale.float(), torch.zeros(len(scale), dtype=torch.int32), axis, -top, top)


def asymmetric(x, bits):
    low, high = min(x.min().item(), 0.), max(x.max().item(), 0.)
    scale = torch.tensor((high - low) / (2**bits - 1)).item()  # rounded to float32
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 2**bits - 1)


@pytest.mark.parametrize('arguments', [
    dict(kernel_size=1), dict(kernel_size=3), dict(kernel_size=4, stride=4),
    dict(kernel_size=3, padding=1, bias=False), dict(kernel_size=(3, 1), padding=(1, 0)),
    dict(kernel_size=3, dilation=2, padding=2), dict(kernel_size=3, groups=2),
    dict(kernel_size=3, padding='same')
])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_equals_the_reference(bits, arguments):
    conv, x = nn.Conv2d(4, 6, **arguments), torch.randn(2, 4, 9, 11)
    op = calibrated(conv, x, weight=QuantSpec(bits, True, 'per_channel'),
                    input=QuantSpec(bits, False))
    expected = F.conv2d(asymmetric(x, bits), symmetric_per_channel(conv.weight, bits, 0),
                        conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert torch.equal(op(x), expected)
    with torch.no_grad():
        assert torch.equal(op(x), expected)
    assert not torch.equal(op(x), conv(x))


@pytest.mark.parametrize('mode', ['reflect', 'circular', 'replicate'])
def test_padding_modes(mode):
    conv, x = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), torch.randn(2, 4, 9, 11)
    op = calibrated(conv, x, weight=QuantSpec(4, True, 'per_channel'), input=QuantSpec(4, False))
    padded = F.pad(asymmetric(x, 4), (1, 1, 1, 1), mode=mode)
    expected = F.conv2d(padded, symmetric_per_channel(conv.weight, 4, 0), conv.bias)
    assert torch.equal(op(x), expected)


def test_zero_padding_stays_zero():
    # All inputs are positive and far from 0, which the range must hold all the same.
    conv, x = nn.Conv2d(1, 1, 3, padding=1, bias=False), torch.rand(1, 1, 5, 5) + 9
    conv.weight.data.fill_(1.)
    op = calibrated(conv, x, input=QuantSpec(4, False))
    # A corner sums 4 pixels and 5 zeros, each pixel rounded to a step of about 10 / 15.
    assert abs(op(x)[0, 0, 0, 0] - x[0, 0, :2, :2].sum()) < 4 * 10 / 15


def test_channel_axes():
    conv, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 11) * torch.arange(1., 5.).view(4, 1, 1)
    spec = QuantSpec(4, True, 'per_channel')
    assert torch.equal(calibrated(conv, x, input=spec)(x),
                       F.conv2d(symmetric_per_channel(x, 4, 1), conv.weight, conv.bias))
    assert torch.equal(calibrated(conv, x, output=spec)(x), symmetric_per_channel(conv(x), 4, 1))
    op = calibrated(conv, x, weight=spec, input=spec, output=spec)
    assert {role: q.scale.shape for role, q in op.quantizers.items()} == dict(
        weight=(6, ), input=(4, ), output=(6, ))


def test_off_equals_float():
    conv, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 9, 11)
    op = calibrated(conv, x, weight=QuantSpec(4), input=QuantSpec(4), output=QuantSpec(4))
    assert not torch.equal(op(x), conv(x))
    for quantizer in op.quantizers.values():
        quantizer.enabled = False
    assert torch.equal(op(x), conv(x))
    assert op.weight is conv.weight and op.bias is conv.bias


def test_changed_weight_and_copy():
    conv, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 11)
    op = calibrated(conv, x, weight=QuantSpec(4, True, 'per_channel'))
    with torch.no_grad():
        before = op(x)
        twin = copy.deepcopy(op)
        op.weight.mul_(-1)
        assert torch.equal(
            op(x), F.conv2d(x, symmetric_per_channel(op.weight, 4, 0), conv.bias))
        assert torch.equal(twin(x), before)


@pytest.mark.parametrize('learned', [True, False])
def test_gradients(learned):
    """They reach ranges if these are asked for some, as the game does."""
    conv, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 11)
    op = calibrated(conv, x, weight=QuantSpec(4, True, 'per_channel'), input=QuantSpec(4, False))
    for quantizer in op.quantizers.values():
        quantizer.scale.requires_grad_(learned)
    op(x).square().sum().backward()
    weight = conv.weight.detach().clone().requires_grad_()
    F.conv2d(asymmetric(x, 4), symmetric_per_channel(weight, 4, 0),
             conv.bias.detach()).square().sum().backward()
    assert torch.allclose(op.weight.grad, weight.grad, rtol=1e-4, atol=1e-3)
    for quantizer in op.quantizers.values():
        if learned:
            assert (quantizer.scale.grad != 0).all()
        else:
            assert quantizer.scale.grad is None


def test_classes():
    assert op_for(nn.Conv2d(1, 1, 1)) is QuantConv2d
    assert op_for(nn.Conv1d(1, 1, 1)) is None
    assert op_for(nn.ConvTranspose1d(1, 1, 1)) is None
    assert op_for(nn.ConvTranspose2d(1, 1, 1)) is QuantConvTranspose2d
    assert op_for(MMCVConv2d(1, 1, 1)) is QuantConv2d
    assert op_for(MMCVLinear(1, 1)) is QuantLinear
    assert op_for(MMCVConvTranspose2d(1, 1, 1)) is QuantConvTranspose2d


def test_mmcv_conv():
    conv, x = MMCVConv2d(4, 6, 3, stride=2), torch.randn(2, 4, 9, 11)
    op = calibrated(conv, x, weight=QuantSpec(4, True, 'per_channel'))
    expected = F.conv2d(x, symmetric_per_channel(conv.weight, 4, 0), conv.bias, stride=2)
    assert torch.equal(op(x), expected)
    empty = torch.zeros(0, 4, 9, 11)
    assert op(empty).shape == conv(empty).shape == (0, 6, 4, 5)


# Transposed convolutions


@pytest.mark.parametrize('kind', [nn.ConvTranspose2d, MMCVConvTranspose2d])
@pytest.mark.parametrize('arguments', [
    dict(kernel_size=2, stride=2), dict(kernel_size=3, padding=1, bias=False),
    dict(kernel_size=(3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 0),
         dilation=(1, 2)),
    dict(kernel_size=2, stride=2, groups=2)])
def test_transposed(kind, arguments):
    conv, x = kind(4, 6, **arguments), torch.randn(2, 4, 5, 7)
    op = QuantConvTranspose2d.from_float(conv, dict(
        weight=QuantSpec(4, True, 'per_channel'), input=QuantSpec(8, True, 'per_channel')))
    assert torch.equal(op(x), conv(x))  # no range yet
    calibrated_op(op, x)
    # the weight's ranges are the output channels': axis 1 of (in, out / groups, kh, kw)
    assert op.weight_quantizer.scale.shape == (6 // arguments.get('groups', 1), )
    names = ('stride', 'padding', 'output_padding', 'groups', 'dilation')
    expected = F.conv_transpose2d(
        symmetric_per_channel(x, 8, 1), symmetric_per_channel(conv.weight, 4, 1), conv.bias,
        **{name: getattr(conv, name) for name in names})
    assert torch.equal(op(x), expected)
    empty = torch.zeros(0, 4, 5, 7)
    assert op(empty).shape == (0, *expected.shape[1:])


def test_transposed_output_size():
    conv, x = nn.ConvTranspose2d(2, 3, 3, stride=2), torch.randn(1, 2, 4, 4)
    op = QuantConvTranspose2d.from_float(conv, dict(weight=QuantSpec(8, True, 'per_channel')))
    for size in ([9, 9], [10, 10], [9, 10]):
        assert torch.equal(op(x, output_size=size), conv(x, output_size=size))
    with pytest.raises(ValueError, match='requested an output size'):
        op(x, output_size=[12, 12])

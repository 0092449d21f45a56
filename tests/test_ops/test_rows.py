# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Ops as the product of a matrix: what GPTQ rounds."""
import pytest
import torch
from torch import nn

from psaq_mm.ops import QuantConv2d, QuantConvTranspose2d, QuantLinear, QuantOp


def op_of(cls, module):
    return cls.from_float(module, {})


@pytest.mark.parametrize('shape', [(5, 8), (2, 3, 8), (2, 3, 4, 8)])
def test_linear(shape):
    linear, x = nn.Linear(8, 6), torch.randn(shape)
    op = op_of(QuantLinear, linear)
    rows = op.input_rows(x) @ op.weight_rows(op.weight).T + linear.bias
    torch.testing.assert_close(rows, linear(x).reshape(-1, 6))
    assert torch.equal(op.weight_of_rows(op.weight_rows(op.weight)), linear.weight)


@pytest.mark.parametrize('arguments', [
    dict(kernel_size=1), dict(kernel_size=3, padding=1), dict(kernel_size=4, stride=4),
    dict(kernel_size=(3, 1), padding=(1, 0), stride=(2, 1)),
    dict(kernel_size=3, dilation=2, padding=2), dict(kernel_size=3, padding='same'),
    dict(kernel_size=2, padding='same'), dict(kernel_size=3, padding='valid'),
    dict(kernel_size=3, padding=1, padding_mode='reflect'),
    dict(kernel_size=3, padding=(1, 2), padding_mode='circular')])
def test_convolution(arguments):
    conv, x = nn.Conv2d(4, 6, **arguments), torch.randn(2, 4, 9, 11)
    op = op_of(QuantConv2d, conv)
    rows = op.input_rows(x) @ op.weight_rows(op.weight).T + conv.bias
    torch.testing.assert_close(rows, conv(x).movedim(1, -1).flatten(0, 2))
    assert torch.equal(op.weight_of_rows(op.weight_rows(op.weight)), conv.weight)


@pytest.mark.parametrize('kernel', [2, (2, 3), 1])
def test_transposed_convolution_without_overlap(kernel):
    conv, x = nn.ConvTranspose2d(4, 6, kernel, stride=kernel), torch.randn(2, 4, 5, 7)
    op = op_of(QuantConvTranspose2d, conv)
    height, width = conv.kernel_size
    rows = op.input_rows(x) @ op.weight_rows(op.weight).T  # (2*5*7, 6*kh*kw)
    blocks = rows.view(2, 5, 7, 6, height, width).permute(0, 3, 1, 4, 2, 5)
    torch.testing.assert_close(blocks.reshape(2, 6, 5 * height, 7 * width)
                               + conv.bias.view(-1, 1, 1), conv(x))
    assert torch.equal(op.weight_of_rows(op.weight_rows(op.weight)), conv.weight)


@pytest.mark.parametrize('cls, module', [
    (QuantConv2d, nn.Conv2d(4, 4, 3, groups=2)),
    (QuantConvTranspose2d, nn.ConvTranspose2d(4, 4, 3, stride=2)),
    (QuantConvTranspose2d, nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)),
    (QuantConvTranspose2d, nn.ConvTranspose2d(4, 4, 2, stride=2, padding=1)),
    (QuantConvTranspose2d, nn.ConvTranspose2d(4, 4, 2, stride=2, dilation=2)),
    (QuantOp, nn.Linear(2, 2))])
def test_ops_that_are_no_such_product(cls, module):
    op = op_of(cls, module)
    assert op.weight_rows(op.weight) is None

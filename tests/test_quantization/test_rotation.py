# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import math

import pytest
import torch
from scipy.linalg import hadamard as scipys

from psaq_mm.quantization import Rotation, fake_quantize, sqnr_db
from psaq_mm.quantization.rotation import block_size, hadamard, rudin_shapiro


@pytest.mark.parametrize('size', [1, 2, 8, 64])
def test_matrix_is_scipys(size):
    expected = torch.from_numpy(scipys(size) / math.sqrt(size)).float()
    torch.testing.assert_close(hadamard(size), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize('channels, size', [(1, 1), (3, 1), (12, 4), (96, 32), (384, 128)])
def test_block_is_the_largest_power_of_two(channels, size):
    assert block_size(channels) == size


def test_signs_by_hand():
    """3 = 11, 6 = 110, 11 = 1011, 12 = 1100 and 13 = 1101 have one pair of ones; 7 = 111 and
    14 = 1110 two, 15 = 1111 three."""
    minus = [i for i, sign in enumerate(rudin_shapiro(16)) if sign < 0]
    assert minus == [3, 6, 11, 12, 13, 15]


@pytest.mark.parametrize('size', [4, 16, 64, 256])
def test_what_all_channels_share_is_spread_evenly(size):
    """Where all signs are alike, the first sum gets all of it."""
    rotated = Rotation(size).rotate(torch.full((1, size), 3.))
    torch.testing.assert_close(rotated.abs(), torch.full((1, size), 3.))


def test_by_hand():
    """Blocks of two of six channels; the signs are those of 0 to 5, of which that of 3 is -1."""
    x = torch.tensor([[3., 1., 0., 2., 5., 4.]])
    expected = torch.tensor([[4., 2., -2., 2., 9., 1.]]) / math.sqrt(2)
    torch.testing.assert_close(Rotation(6).rotate(x), expected)


@pytest.mark.parametrize('shape', [(12, ), (5, 12), (2, 3, 4, 24)])
def test_back_and_lengths(shape):
    rotation, x = Rotation(shape[-1]), torch.randn(shape)
    turned = rotation.rotate(x)
    assert turned.shape == x.shape and not torch.allclose(turned, x)
    torch.testing.assert_close(rotation.rotate_back(turned), x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize('channels', [1, 2, 4, 8, 24, 32, 96, 128])
def test_rotation_is_the_product_with_one_matrix(channels):
    size = block_size(channels)
    one = torch.from_numpy(scipys(size) / math.sqrt(size)).float()
    turn = rudin_shapiro(channels).diag() @ torch.block_diag(*[one] * (channels // size))
    x = torch.randn(3, 5, channels)
    torch.testing.assert_close(Rotation(channels).rotate(x), x @ turn)


def test_products_stay():
    x, weight, rotation = torch.randn(7, 24), torch.randn(5, 24), Rotation(24)
    torch.testing.assert_close(rotation.rotate(x) @ rotation.rotate(weight).T, x @ weight.T,
                               rtol=1e-4, atol=1e-5)


def test_wide_channel_takes_fewer_integers_from_the_rest():
    """One channel is ten times as wide as the others: 4 bits over the whole range leave a
    quarter of the error or less where it is rotated."""
    x = torch.randn(4096, 64)
    x[:, 5] *= 10

    def kept(values):
        low, high = values.min(), values.max()
        scale = (high - low) / 15
        return sqnr_db(values, fake_quantize(values, scale, (-low / scale).round(), (0, 15)))

    assert kept(Rotation(64).rotate(x)) - kept(x) > 6


def test_module_takes_the_mean_away_once_it_is_set():
    rotation, x = Rotation(12), torch.randn(5, 12) + 7
    assert not rotation.active and rotation(x) is x
    rotation.mean = x.mean(0)
    assert rotation.active
    torch.testing.assert_close(rotation(x), rotation.rotate(x - x.mean(0)))
    assert rotation(x).mean(0).abs().max() < 1e-5


def test_state_dict_says_whether_the_mean_is_set():
    rotation, other = Rotation(12), Rotation(12)
    other.load_state_dict(rotation.state_dict())
    assert not other.active
    rotation.mean = torch.randn(12)
    assert list(rotation.state_dict()) == ['mean']  # the rest is known
    other.load_state_dict(rotation.state_dict())
    assert torch.equal(other.mean, rotation.mean)

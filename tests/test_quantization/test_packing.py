# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.quantization.packing import old_slot_bits, pack_integers, unpack_integers


@st.composite
def bits_and_values(draw):
    bits = draw(st.integers(2, 8))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtypes = [torch.int8, torch.int16, torch.int32, torch.int64]
    count = math.prod(shape)
    values = draw(st.lists(st.integers(-2**(bits - 1), 2**(bits - 1) - 1),
                           min_size=count, max_size=count))
    return bits, torch.tensor(values, dtype=draw(st.sampled_from(dtypes))).reshape(shape)


@settings(max_examples=300, deadline=None)
@given(bits_and_values())
def test_round_trip(case):
    bits, values = case
    packed = pack_integers(values, bits)
    assert packed.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert packed.numel() == math.ceil(values.numel() * bits / 8)
    assert packed.shape == (values.shape if bits == 8 else (packed.numel(), ))
    unpacked = unpack_integers(packed, bits, values.shape)
    assert unpacked.dtype == torch.int8
    assert unpacked.shape == values.shape
    assert torch.equal(unpacked.long(), values.long())


@pytest.mark.parametrize('bits', range(2, 9))
def test_every_value_round_trips(bits):
    values = torch.arange(-2**(bits - 1), 2**(bits - 1))
    assert torch.equal(unpack_integers(pack_integers(values, bits), bits, values.shape).long(),
                       values)


@pytest.mark.parametrize('bits, values, expected', [
    # -1 is 0xF, -8 is 0x8; the odd fifth value fills the low half of its byte.
    (4, [1, -1, 7, -8, 3], [0xF1, 0x87, 0x03]),
    (4, [-3], [0x0D]),
    # -4 is 0b100, 3 is 0b011, -1 is 0b111: the third value begins in the first byte.
    (3, [-4, 3, -1], [0b11_011_100, 0b1]),
    (6, [-32, 1, -1], [0b01_100000, 0b1111_0000, 0b11]),
    # -2 is 0b10, -1 is 0b11.
    (2, [0, 1, -2, -1, 1], [0b11_10_01_00, 0b01]),
    (2, [-1, -1, -1, -1], [0xFF]),
])
def test_bytes_by_hand(bits, values, expected):
    packed = pack_integers(torch.tensor(values), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    assert unpack_integers(packed, bits, [len(values)]).tolist() == values


def test_eight_bits_stay_int8():
    values = torch.tensor([[-128, 127], [0, -1]])
    packed = pack_integers(values, 8)
    assert packed.dtype == torch.int8
    assert packed.tolist() == values.tolist()


@pytest.mark.parametrize('bits, stored, values', [
    # Two values a byte: -4 is 0xC.
    (3, torch.tensor([0x3C, 0x0F], dtype=torch.uint8), [-4, 3, -1]),
    (4, torch.tensor([0xF1], dtype=torch.uint8), [1, -1]),
    (6, torch.tensor([-32, 31], dtype=torch.int8), [-32, 31]),
])
def test_values_of_older_checkpoints(bits, stored, values):
    assert unpack_integers(stored, bits, [len(values)], old_slot_bits(bits)).tolist() == values


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_results_are_contiguous_copies(bits):
    values = torch.tensor([[-1, 0, 1], [1, 0, -2]], dtype=torch.int8).t()
    packed = pack_integers(values, bits)
    unpacked = unpack_integers(packed, bits, values.shape)
    assert packed.is_contiguous()
    assert unpacked.is_contiguous()
    packed.zero_()
    assert values.tolist() == unpacked.tolist() == [[-1, 1], [0, 0], [1, -2]]


@pytest.mark.parametrize('bits', range(2, 9))
def test_values_out_of_range(bits):
    for value in (-2**(bits - 1) - 1, 2**(bits - 1), 2**40):
        with pytest.raises(ValueError, match=f'{bits}-bit values lie in'):
            pack_integers(torch.tensor([0, value]), bits)


@pytest.mark.parametrize('bits', [-1, 0, 1, 9, 32, 4.0, True])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match='bits must be an integer from 2 to 8'):
        pack_integers(torch.zeros(4, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match='bits must be an integer from 2 to 8'):
        unpack_integers(torch.zeros(4, dtype=torch.int8), bits, [4])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bool, torch.complex64])
def test_values_that_are_no_integers(dtype):
    with pytest.raises(ValueError, match='expected a tensor of integers'):
        pack_integers(torch.zeros(4, dtype=dtype), 4)


@pytest.mark.parametrize('bits, size, shape', [
    (8, 3, [2, 2]), (8, 5, [2, 2]), (4, 1, [3]), (4, 3, [3]), (3, 0, [1]), (3, 2, [2]),
    (6, 2, [3]), (2, 2, [4]), (2, 1, [5]), (4, 1, [0]), (8, 0, [])
])
def test_wrong_number_of_bytes(bits, size, shape):
    dtype = torch.int8 if bits == 8 else torch.uint8
    with pytest.raises(ValueError, match='bytes, got'):
        unpack_integers(torch.zeros(size, dtype=dtype), bits, shape)


def test_wrong_dtype_of_bytes():
    with pytest.raises(ValueError, match='stored as torch.uint8'):
        unpack_integers(torch.zeros(2, dtype=torch.int8), 4, [4])
    with pytest.raises(ValueError, match='stored as torch.int8'):
        unpack_integers(torch.zeros(4, dtype=torch.uint8), 8, [4])


def test_stored_values_out_of_range():
    with pytest.raises(ValueError, match='3-bit values lie in'):
        unpack_integers(torch.tensor([0x04], dtype=torch.uint8), 3, [2], 4)
    with pytest.raises(ValueError, match='6-bit values lie in'):
        unpack_integers(torch.tensor([32], dtype=torch.int8), 6, [1], 8)

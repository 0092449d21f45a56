# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Signed integers of 2 to 8 bits, packed into bytes and back.

| bits   | stored as                                            |
|--------|------------------------------------------------------|
| 5 to 8 | int8, one value a byte, the shape of the values      |
| 3, 4   | uint8, two values a byte, the first in the low half  |
| 2      | uint8, four values a byte, the first in the low bits |

Values of 2, 3 and 4 bits are stored in two's complement and flattened; unused
bits of the last byte are zero.
"""

import math
from typing import Sequence

import torch
from torch import Tensor

from psaq_mm.sections import is_integer

MIN_BITS = 2
MAX_BITS = 8
_INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Pack signed integers as tightly as whole bytes allow.

    Args:
        values (Tensor): Integers in [-2**(bits-1), 2**(bits-1) - 1], any
            shape, any integer dtype.
        bits (int): Bits of a value, 2 to 8.

    Returns:
        Tensor: At 5 to 8 bits, int8 with the shape of ``values``. Below,
        uint8 with shape of (ceil(N / values_per_byte), ), where N is the
        number of values.

    Raises:
        ValueError: If a value does not fit into ``bits``, ``bits`` is not in
            2 to 8 or ``values`` is not of an integer dtype.
    """
    slot_bits = _slot_bits(bits)
    if values.dtype not in _INTEGER_DTYPES:
        raise ValueError(f'expected a tensor of integers, got {values.dtype}')
    _require_range(values, bits)
    if slot_bits == 8:
        return values.to(torch.int8, copy=True, memory_format=torch.contiguous_format)

    per_byte = 8 // slot_bits
    # uint8 keeps the low bits of a negative number: two's complement, then cut to the slot.
    slots = values.reshape(-1).to(torch.uint8) & (2**slot_bits - 1)
    padding = -slots.numel() % per_byte
    columns = torch.nn.functional.pad(slots, (0, padding)).reshape(-1, per_byte)
    packed = columns[:, 0].clone()
    for index in range(1, per_byte):
        packed |= columns[:, index] << (index * slot_bits)
    return packed


def unpack_integers(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_integers`: int8 values of that shape.

    Raises:
        ValueError: If ``bits`` is not in 2 to 8, or dtype or number of bytes
            do not belong to ``shape``, or a stored value does not fit into
            ``bits``.
    """
    slot_bits = _slot_bits(bits)
    count = math.prod(shape)
    expected_bytes = packed_bytes(count, bits)
    expected_dtype = torch.int8 if slot_bits == 8 else torch.uint8
    if packed.dtype != expected_dtype:
        raise ValueError(f'{bits}-bit values are stored as {expected_dtype}, got {packed.dtype}')
    if packed.numel() != expected_bytes:
        raise ValueError(f'{count} values of {bits} bits take {expected_bytes} bytes, '
                         f'got {packed.numel()}')

    if slot_bits == 8:
        values = packed.clone().reshape(tuple(shape))
    else:
        shifts = torch.arange(0, 8, slot_bits, dtype=torch.uint8, device=packed.device)
        slots = (packed.reshape(-1, 1) >> shifts) & (2**slot_bits - 1)
        # Flipping the sign bit and taking its weight away again extends the sign to 8 bits.
        sign = 2**(slot_bits - 1)
        values = (slots ^ sign).to(torch.int8).reshape(-1)[:count] - sign
        values = values.reshape(tuple(shape))
    _require_range(values, bits)
    return values


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes so many values of ``bits`` take when they are packed."""
    return -(-count * _slot_bits(bits) // 8)


def _slot_bits(bits: int) -> int:
    """Bits that a value takes in storage: 2, 4 or 8."""
    if not is_integer(bits) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f'bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}')
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def _require_range(values: Tensor, bits: int) -> None:
    if values.numel() == 0:
        return
    lowest, highest = -2**(bits - 1), 2**(bits - 1) - 1
    smallest, largest = int(values.min()), int(values.max())
    if smallest < lowest or largest > highest:
        raise ValueError(f'{bits}-bit values lie in [{lowest}, {highest}], '
                         f'got [{smallest}, {largest}]')

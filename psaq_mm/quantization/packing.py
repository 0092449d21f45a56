# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Signed integers of 2 to 8 bits, packed into bytes and back.

Integers of 8 bits are stored as int8, in their shape. Fewer bits are stored in two's complement,
one value after the other without gaps, as flat uint8: the first bit of a value is its lowest, the
first bit of a byte is its lowest, and unused bits of the last byte are zero. 8 values of 3 bits
take 3 bytes.
"""

import math
from typing import Optional, Sequence

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
        Tensor: At 8 bits, int8 with the shape of ``values``. Below, uint8 with shape of
        (ceil(N * bits / 8), ), where N is the number of values.

    Raises:
        ValueError: If a value does not fit into ``bits``, ``bits`` is not in
            2 to 8 or ``values`` is not of an integer dtype.
    """
    _require_bits(bits)
    if values.dtype not in _INTEGER_DTYPES:
        raise ValueError(f'expected a tensor of integers, got {values.dtype}')
    _require_range(values, bits)
    if bits == 8:
        return values.to(torch.int8, copy=True, memory_format=torch.contiguous_format)
    # uint8 keeps the low bits of a negative number: two's complement.
    digits = _digits(values.reshape(-1).to(torch.uint8), bits).reshape(-1)
    digits = torch.nn.functional.pad(digits, (0, -digits.numel() % 8)).reshape(-1, 8)
    return (digits << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(
        1, dtype=torch.uint8)


def unpack_integers(packed: Tensor, bits: int, shape: Sequence[int],
                    slot_bits: Optional[int] = None) -> Tensor:
    """Undo :func:`pack_integers`: int8 values of that shape.

    Args:
        packed (Tensor): What it gave.
        bits (int): Bits of a value.
        shape (Sequence[int]): Of the values.
        slot_bits (int, optional): Bits that a value takes in storage, of :func:`old_slot_bits`.
            Defaults to None: ``bits``.

    Raises:
        ValueError: If ``bits`` is not in 2 to 8, or dtype or number of bytes
            do not belong to ``shape``, or a stored value does not fit into
            ``bits``.
    """
    _require_bits(bits)
    slot = slot_bits or bits
    count = math.prod(shape)
    expected_bytes = packed_bytes(count, slot)
    expected_dtype = torch.int8 if slot == 8 else torch.uint8
    if packed.dtype != expected_dtype:
        raise ValueError(f'{bits}-bit values are stored as {expected_dtype}, got {packed.dtype}')
    if packed.numel() != expected_bytes:
        raise ValueError(f'{count} values of {bits} bits take {expected_bytes} bytes, '
                         f'got {packed.numel()}')
    if slot == 8:
        values = packed.clone().reshape(tuple(shape))
    else:
        digits = _digits(packed.reshape(-1), 8).reshape(-1)[:count * slot].reshape(count, slot)
        values = (digits << torch.arange(slot, dtype=torch.uint8, device=packed.device)).sum(
            1, dtype=torch.uint8)
        # Flipping the sign bit and taking its weight away again extends the sign to 8 bits.
        sign = 2**(slot - 1)
        values = ((values ^ sign).to(torch.int8) - sign).reshape(tuple(shape))
    _require_range(values, bits)
    return values


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes so many values of ``bits`` take when they are packed."""
    return -(-count * bits // 8)


def old_slot_bits(bits: int) -> int:
    """Bits that a value took in checkpoints up to format version 2: 2, 4 or 8."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def _digits(values: Tensor, bits: int) -> Tensor:
    """The lowest bits of uint8 values of shape (N, ), the lowest first, shape (N, bits)."""
    return values.unsqueeze(1) >> torch.arange(bits, dtype=torch.uint8, device=values.device) & 1


def _require_bits(bits: int) -> None:
    if not is_integer(bits) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f'bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}')


def _require_range(values: Tensor, bits: int) -> None:
    if values.numel() == 0:
        return
    lowest, highest = -2**(bits - 1), 2**(bits - 1) - 1
    smallest, largest = int(values.min()), int(values.max())
    if smallest < lowest or largest > highest:
        raise ValueError(f'{bits}-bit values lie in [{lowest}, {highest}], '
                         f'got [{smallest}, {largest}]')

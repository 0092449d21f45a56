# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Spread what is wide in few channels over many, before it is quantized."""
from typing import Any, Mapping

import torch
from torch import Tensor, nn


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over its norm, shape (size, size): orthogonal, symmetric, and
    all elements have the same magnitude. ``size`` is a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1., 1.], [1., -1.]]))
    return matrix / size**0.5


def block_size(channels: int) -> int:
    """Channels that are mixed with each other: the largest power of 2 that divides them."""
    return channels & -channels


def rudin_shapiro(count: int) -> Tensor:
    """The first Rudin-Shapiro signs, shape (count,): -1 where the index has, in binary, an odd
    number of pairs of ones side by side.

    A randomized Hadamard matrix has random ones. These are the same everywhere, and spread what
    all channels have in common evenly: in blocks of 4, 16, 64... each sum gets as much [choice].
    """
    return torch.tensor([1. - 2. * (bin(i & i >> 1).count('1') % 2) for i in range(count)])


class Rotation(nn.Module):
    """Takes the mean from each channel of an input, and rotates the rest.

    Each block of :func:`block_size` channels becomes as many sums of them all, with signs: its
    product with a Hadamard matrix. What one channel alone has of large values is spread over the
    block, and what comes out is close to a normal distribution, to which few integers fit better
    [QuaRot, arXiv 2404.00456, section 3].

    The layer that reads it multiplies what is rotated by rotated weights, and its bias holds
    what the mean contributes: so outputs do not change. The mean is taken away as it would be
    one more channel that is wide [choice]. Until :attr:`mean` is set it does nothing.

    Args:
        channels (int): C of the input, shape (..., C).
    """

    mean: Tensor
    """Of each channel, shape (C,); empty until it is set."""
    signs: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer('mean', torch.empty(0))
        self.register_buffer('signs', rudin_shapiro(channels), persistent=False)
        # As a Hadamard matrix of n is the Kronecker product of two of about the root of n: 4096
        # channels would take one of 64 MB, and more products than the layer itself.
        size = block_size(channels)
        left = 1 << (size.bit_length() - 1) // 2
        self.register_buffer('left', hadamard(left), persistent=False)
        self.register_buffer('right', hadamard(size // left), persistent=False)

    @property
    def active(self) -> bool:
        """bool: Whether the mean is set."""
        return self.mean.numel() > 0

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the last axis, of C channels; lengths and products stay."""
        return self._mix(x * self.signs)

    def rotate_back(self, x: Tensor) -> Tensor:
        """Undo :meth:`rotate`."""
        return self._mix(x) * self.signs

    def _mix(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, len(self.left), len(self.right)))
        return (self.left @ blocks @ self.right).flatten(-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rotate(x - self.mean) if self.active else x

    def reshape_like(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Take the shape that a state dict has for the mean: it says whether it is set."""
        value = state.get(f'{prefix}mean')
        if value is not None and value.shape != self.mean.shape:
            self.mean = torch.zeros_like(value, device=self.mean.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any,
                              **kwargs: Any) -> None:
        self.reshape_like(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

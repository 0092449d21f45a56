# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Differentiable densities of cosine similarities, and their entropy.

Two estimates of the same density are here:

- :func:`exact_density` is the Gaussian kernel density estimate as written in
  every textbook, and as V1 uses it [v1]. Its cost is values times grid points.
- :func:`binned_density` first shares every value out between its two
  neighbouring points of a fixed grid over [-1, 1], then smooths that histogram
  with the same kernel [choice]. Its cost hardly depends on the grid, so the
  grid can be dense enough for the gradient to mean something.
"""
import math
from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SQRT_2PI = math.sqrt(2 * math.pi)
# Beyond this many bandwidths the Gaussian is below 1e-7 of its peak.
_KERNEL_REACH = 6
# The exponent below which a kernel counts as e^-80: exp is up to nine times as slow where its
# result is too small for a float [measured].
_LEAST_EXPONENT = -80
# Elements of (points, values) that the exact estimate holds at a time: 16 MB in float32.
_EXACT_CHUNK = 4 * 1024 * 1024


def _index_dtype(bins: int) -> torch.dtype:
    """Smallest integer type that holds the cells 0..bins-1 (the last is the discard cell)."""
    if bins <= 256:
        return torch.uint8
    return torch.int16 if bins <= 32768 else torch.int32


class _LinearBinning(torch.autograd.Function):
    """Row-wise linear binning of values in [-1, 1].

    Between the ``bins`` grid points lie ``bins - 1`` cells. The number of
    values in each cell and the sum of their positions inside it hold all that
    linear binning needs, so values that do not count are simply sent to one
    more cell, which is dropped. Backward needs the cells alone: that is one
    byte per value up to 256 bins.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, valid: Optional[Tensor], bins: int) -> Tensor:
        """Mass on each grid point, shape (rows, bins), of values of shape (rows, M)."""
        position = (values + 1).mul_((bins - 1) / 2)
        # Cosines may leave [-1, 1] by a rounding error: they belong to the outermost cells.
        # The last grid point belongs to the cell on its left.
        position.clamp_(0, bins - 1)
        cell = position.to(torch.int32).clamp_(0, bins - 2)
        position.sub_(cell)
        if valid is not None:
            # The maximum is many times faster than masked_fill_ on a CPU.
            discard = (~valid).to(torch.int32).mul_(bins - 1)
            cell = torch.maximum(cell, discard)
        index = cell.to(torch.int64)
        shape = (values.shape[0], bins)
        # Zeros plus a scatter, and not torch.bincount: twice as fast, and row by row the float32
        # sums stay short.
        right = position.new_zeros(shape).scatter_add_(1, index, position)
        mass = position.new_zeros(shape).scatter_add_(1, index, position.fill_(1))
        mass[:, bins - 1] = 0
        right[:, bins - 1] = 0
        mass.sub_(right)
        mass[:, 1:].add_(right[:, :-1])
        ctx.save_for_backward(cell.to(_index_dtype(bins)))
        ctx.bins = bins
        return mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        """Slope of the gradient in each value's cell; 0 in the discard cell."""
        (cell, ) = ctx.saved_tensors
        slope = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        torch.sub(grad[:, 1:], grad[:, :-1], out=slope[:, :-1])
        slope.mul_((ctx.bins - 1) / 2)
        return slope.gather(1, cell.to(torch.int64)), None, None


def linear_binning(values: Tensor, bins: int, valid: Optional[Tensor] = None) -> Tensor:
    """Share out each value's unit mass between its two neighbouring grid points.

    The grid is ``bins`` points from -1 to 1, both included. Values beyond the
    ends count as the ends.

    Args:
        values (Tensor): Values with shape of (rows, M).
        bins (int): Number of grid points, at least 2.
        valid (Tensor, optional): As of :func:`binned_density`.

    Returns:
        Tensor: Mass on each grid point, with shape of (rows, bins).
    """
    return _LinearBinning.apply(values, valid, bins)


def gaussian_kernel(step: float, bandwidth: float) -> Tensor:
    """Gaussian sampled at the distances of an even grid, with sum 1.

    Returns:
        Tensor: Weights in float64, with shape of (2 * reach + 1, ).
    """
    reach = max(1, math.ceil(_KERNEL_REACH * bandwidth / step))
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64) * (step / bandwidth)
    kernel = torch.exp(-0.5 * distance * distance)
    return kernel / kernel.sum()


def binned_density(values: Tensor, bins: int = 256, bandwidth: float = 0.01,
                   valid: Optional[Tensor] = None) -> Tensor:
    """Density of each image's similarities on a fixed grid over [-1, 1] [choice].

    It is the Gaussian kernel density estimate evaluated on the grid, after each
    value was moved to its two neighbouring grid points. As with the exact
    estimate, the kernel's mass beyond -1 and 1 is lost: a patch's similarity of
    1 to itself leaves half of its mass inside.

    Args:
        values (Tensor): Similarities with shape of (B, ..., M): all entries of
            one index in the first dimension belong to one image.
        bins (int): Number of grid points. Defaults to 256.
        bandwidth (float): Standard deviation h of the kernel. Defaults to 0.01,
            as V1 [v1].
        valid (Tensor, optional): Boolean, broadcastable to ``values``: True for
            the values that count. Defaults to None, which counts them all.

    Returns:
        Tensor: Density on ``torch.linspace(-1, 1, bins)``, with shape of
        (B, bins). It is 0 for an image without any value that counts.
    """
    batch_size, length = values.shape[0], values.shape[-1]
    if not values.is_floating_point() or values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    rows = values.reshape(-1, length)
    if valid is not None:
        valid = valid.expand(values.shape).reshape(-1, length)
    mass = linear_binning(rows, bins, valid).reshape(batch_size, -1, bins).sum(1)
    # Binning shares out a mass of 1 per value, so this is the number of values that count.
    count = mass.detach().sum(1, keepdim=True).clamp_(min=1)
    step = 2 / (bins - 1)
    kernel = gaussian_kernel(step, bandwidth).to(mass)
    reach = kernel.numel() // 2
    # Not conv1d, which cuDNN computes in TF32.
    padded = torch.nn.functional.pad(mass / (count * step), (reach, reach))
    return (padded.unfold(1, kernel.numel(), 1) * kernel).sum(-1)


class _ExactDensity(torch.autograd.Function):
    """Gaussian kernel density estimate, a chunk of the values at a time.

    Backward computes the kernel again instead of keeping (points, M) numbers.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, grid: Tensor, bandwidth: float,
                chunk: int) -> Tensor:
        """Density of shape (B, points), of values and weights of shape (B, M)."""
        density = values.new_zeros(values.shape[0], grid.shape[-1])
        for part, share in zip(values.split(chunk, 1), weight.split(chunk, 1)):
            z = (grid[..., :, None] - part[:, None, :]).div_(bandwidth)
            z.square_().mul_(-0.5).clamp_(min=_LEAST_EXPONENT).exp_()
            density += z.mul_(share[:, None, :]).sum(-1)
        ctx.save_for_backward(values, weight, grid)
        ctx.bandwidth, ctx.chunk = bandwidth, chunk
        return density.div_(bandwidth * _SQRT_2PI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None, None, None]:
        """Derivative of the kernel at each value, summed over the grid, shape (B, M)."""
        values, weight, grid = ctx.saved_tensors
        parts = []
        for part, share in zip(values.split(ctx.chunk, 1), weight.split(ctx.chunk, 1)):
            z = (grid[..., :, None] - part[:, None, :]).div_(ctx.bandwidth)
            kernel = z.square().mul_(-0.5).clamp_(min=_LEAST_EXPONENT).exp_()
            slope = kernel.mul_(z).mul_(grad[:, :, None]).sum(1)
            parts.append(slope.mul_(share))
        total = torch.cat(parts, 1).div_(ctx.bandwidth**2 * _SQRT_2PI)
        return total, None, None, None, None


def exact_density(values: Tensor, grid: Tensor, bandwidth: float = 0.01,
                  valid: Optional[Tensor] = None) -> Tensor:
    """Gaussian kernel density estimate of each image's values [v1].

    p(x) = 1 / (M h sqrt(2 pi)) * sum over m of exp(-((x - s_m) / h)^2 / 2).

    It is the reference that :func:`binned_density` is tested against, which says what the
    other arguments are. The gradient flows to the values and not to the grid. Memory is bounded.

    Args:
        grid (Tensor): Points x with shape of (points, ), or (B, points) for
            images with grids of their own.

    Returns:
        Tensor: Density with shape of (B, points). It is 0 for an image without
        any value that counts.
    """
    if not values.is_floating_point() or values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    flat = values.reshape(values.shape[0], -1)
    if valid is None:
        weight = flat.new_full((1, 1), 1 / max(flat.shape[1], 1)).expand(flat.shape)
    else:
        weight = valid.expand(values.shape).reshape(flat.shape).to(flat)
        weight = weight / weight.sum(1, keepdim=True).clamp_(min=1)
    chunk = max(1, _EXACT_CHUNK // max(1, flat.shape[0] * grid.shape[-1]))
    return _ExactDensity.apply(flat, weight, grid.detach().to(flat), bandwidth, chunk)


def entropy(density: Tensor, grid: Union[float, Tensor], eps: float = 1e-4) -> Tensor:
    """Differential entropy by the trapezoidal rule: -p log p, with p += eps [v1].

    Args:
        density (Tensor): Density p with shape of (B, points).
        grid (float | Tensor): Distance between the points of an even grid, or
            the points with shape of (points, ) or (B, points).
        eps (float): What is added to p, so that its logarithm exists. Defaults
            to 1e-4, as V1.

    Returns:
        Tensor: Entropy of each image, with shape of (B, ).
    """
    p = density + eps
    integrand = -p * torch.log(p)
    if isinstance(grid, Tensor):
        return torch.trapezoid(integrand, grid.to(integrand), dim=-1)
    return torch.trapezoid(integrand, dx=float(grid), dim=-1)

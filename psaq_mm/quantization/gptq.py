# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Round a weight matrix so that what it gives for known inputs stays.

GPTQ (Frantar et al., 2023, arXiv 2210.17323): columns are rounded one after
another, and what one loses is made up for by those that are still to come, as
far as their inputs go together.
"""
from typing import List, Tuple

import torch
from torch import Tensor

from .fake_quantize import fake_quantize

MAX_INPUTS = 4096
"""Inputs whose second moments are kept together; a layer of more is cut into equal
parts, which do not make up for each other [choice]: time and memory stay small, and
the layers of a Swin backbone up to the width of Swin-B whole."""

BLOCK = 128
"""Columns after which the rest of a matrix is brought up to date [GPTQ, section 3.3]."""

DAMPING = 0.01
"""Of the mean of a second moment's diagonal, added to it [GPTQ, section 3.3]."""


def parts_of(inputs: int) -> List[int]:
    """Sizes of the parts that so many inputs are cut into."""
    count = -(-inputs // MAX_INPUTS)
    return [inputs // count + (i < inputs % count) for i in range(count)]


def second_moments(x: Tensor) -> List[Tensor]:
    """The sum of x x^T over inputs, the rows of ``x`` of shape (N, I), of each part.

    Returns:
        list[Tensor]: Shape (P, P) each, float32; the parts' sizes P add up to I.
    """
    return [part.T @ part for part in x.float().split(parts_of(x.shape[1]), 1)]


def inverse_factor(second_moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped second moment H of shape (P, P).

    Returns:
        Tensor: U, upper triangular, float64, with U^T U = (H + d)^-1.

    Raises:
        ValueError: If H is not finite.
    """
    moment = second_moment.double()
    if not torch.isfinite(moment).all():
        raise ValueError('inputs of the layer are not finite')
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    # Of a layer that saw zeros alone any will do.
    step = DAMPING * moment.diagonal().mean() or torch.ones_like(moment[0, 0])
    while True:
        # H = R R^T with R upper triangular, from the Cholesky factor of H in reverse order;
        # H^-1 = R^-T R^-1, so the factor is R^-1, and H itself is never inverted.
        lower, failed = torch.linalg.cholesky_ex((moment + step * identity).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        step = 10 * step


@torch.no_grad()
def gptq_round(weight: Tensor, moments: List[Tensor], scale: Tensor, zero_point: Tensor,
               integer_range: Tuple[int, int]) -> Tensor:
    """Round a matrix W to the integers of a scale, so that W x changes little.

    Minimises the sum of ||W x - Q x||^2 over inputs x greedily, column by
    column in the order of falling second moments, as GPTQ's code does with
    ``--act-order``.

    Args:
        weight (Tensor): W, shape (O, I).
        moments (list[Tensor]): From :func:`second_moments`.
        scale (Tensor): Of each row, shape (O,).
        zero_point (Tensor): Integers as float, likewise.
        integer_range (tuple[int, int]): Smallest and largest integer.

    Returns:
        Tensor: Q, of W's shape and type; values of integers.

    Raises:
        ValueError: If a moment is not finite.
    """
    def nearest(column: Tensor) -> Tensor:
        return fake_quantize(column, scale, zero_point, integer_range, 0)

    parts = []
    for part, moment in zip(weight.split([len(m) for m in moments], 1), moments):
        order = moment.diagonal().argsort(descending=True, stable=True)
        factor = inverse_factor(moment[order][:, order]).to(torch.float32)
        rest, rounded = part.float()[:, order], torch.empty_like(part, dtype=torch.float32)
        for start in range(0, len(order), BLOCK):
            stop = min(start + BLOCK, len(order))
            block, errors = rest[:, start:stop], torch.empty_like(rest[:, start:stop])
            for i in range(stop - start):
                row = factor[start + i, start + i:stop]
                rounded[:, start + i] = nearest(block[:, i])
                errors[:, i] = (block[:, i] - rounded[:, start + i]) / row[0]
                block[:, i:] -= torch.outer(errors[:, i], row)
            rest[:, stop:] -= errors @ factor[start:stop, stop:]
        parts.append(rounded[:, order.argsort()])
    return torch.cat(parts, 1).to(weight.dtype)

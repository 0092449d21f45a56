# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far a student is from its teacher: what the two sides compete over.

A *tap* is a tensor that teacher and student both compute, such as the feature
map of a stage. Taps come in groups (``backbone``, ``neck``, ``scores``,
``deltas``, ``logits``, ``rois``), and are called ``<group>.<number>``. Pure
functions of tensors, without labels.
"""
from typing import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6


def _by_image(values: Tensor) -> Tensor:
    """Mean over everything but the images: shape (B,)."""
    return values.reshape(len(values), -1).mean(1)


def relative_l1(teacher: Tensor, student: Tensor) -> Tensor:
    """``mean|T - S| / (mean|T| + eps)`` of each image: free of the tap's scale [choice].

    Both are of shape (B, ...), the result of shape (B,).
    """
    return _by_image((teacher - student).abs()) / (_by_image(teacher.abs()) + EPSILON)


def binary_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL divergence of the student's Bernoulli scores from the teacher's, of
    each image, for logits that go through a sigmoid [peer: APHQ-ViT].

    Both are of shape (B, ...), the result of shape (B,), in nats a score.
    """
    p = teacher.sigmoid()
    on, off = F.logsigmoid(teacher), F.logsigmoid(-teacher)
    return _by_image(p * (on - F.logsigmoid(student)) + (1 - p) * (off - F.logsigmoid(-student)))


def group_of(tap: str) -> str:
    """The group of a tap: what stands before the first dot."""
    return tap.split('.', 1)[0]


def discrepancy(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor],
                weights: Mapping[str, float]) -> Tensor:
    """Weighted sum over taps, of each image: :func:`binary_kl` of ``scores``, and
    :func:`relative_l1` of the rest [choice].

    Args:
        teacher (Mapping[str, Tensor]): Tap to tensor of shape (B, ...).
        student (Mapping[str, Tensor]): The same taps.
        weights (Mapping[str, float]): Group to weight; taps of other groups
            do not count.

    Returns:
        Tensor: D of each image, shape (B,).

    Raises:
        ValueError: If no tap counts.
    """
    parts = []
    for tap, expected in teacher.items():
        group = group_of(tap)
        if weights.get(group):
            distance = binary_kl if group == 'scores' else relative_l1
            parts.append(weights[group] * distance(expected, student[tap]))
    if not parts:
        raise ValueError(f'no tap of {", ".join(teacher) or "the model"} has a weight')
    return torch.stack(parts).sum(0)

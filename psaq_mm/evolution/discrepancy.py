# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far a student is from its teacher: what the two sides compete over.

A *tap* is a tensor that teacher and student both compute, such as the feature
map of a stage. Taps come in groups (``backbone``, ``neck``, ``scores``,
``deltas``, ``logits``, ``rois``), and are called ``<group>.<number>``. Pure
functions of tensors, without labels.
"""
from typing import Callable, Dict, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CONFIDENT = 0.7
"""Teacher's score from which a box delta counts [peer: APHQ-ViT]."""

EPSILON = 1e-6


def _by_image(values: Tensor) -> Tensor:
    """Mean over everything but the images: shape (B,)."""
    return values.reshape(len(values), -1).mean(1)


def relative_l1(teacher: Tensor, student: Tensor) -> Tensor:
    """``mean|T - S| / (mean|T| + eps)`` of each image: free of the tap's scale
    [choice].

    Args:
        teacher (Tensor): Shape (B, ...).
        student (Tensor): Same shape.

    Returns:
        Tensor: Shape (B,).
    """
    return _by_image((teacher - student).abs()) / (_by_image(teacher.abs()) + EPSILON)


def relative_l2(teacher: Tensor, student: Tensor) -> Tensor:
    """``sum (T - S)^2 / (sum T^2 + eps)`` of each image, the inverse of a signal
    to noise ratio [choice].

    Args:
        teacher (Tensor): Shape (B, ...).
        student (Tensor): Same shape.

    Returns:
        Tensor: Shape (B,).
    """
    return _by_image((teacher - student).square()) / (_by_image(teacher.square()) + EPSILON)


def binary_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL divergence of the student's Bernoulli scores from the teacher's, of
    each image, for logits that go through a sigmoid [peer: APHQ-ViT].

    Args:
        teacher (Tensor): Logits of shape (B, ...).
        student (Tensor): Same shape.

    Returns:
        Tensor: Shape (B,), in nats a score.
    """
    p = teacher.sigmoid()
    on, off = F.logsigmoid(teacher), F.logsigmoid(-teacher)
    return _by_image(p * (on - F.logsigmoid(student)) + (1 - p) * (off - F.logsigmoid(-student)))


def softmax_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL divergence over the classes, of each image, for logits that go
    through a softmax [choice; Hinton et al., 2015].

    Args:
        teacher (Tensor): Logits of shape (B, classes, ...).
        student (Tensor): Same shape.

    Returns:
        Tensor: Shape (B,), in nats a position.
    """
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    return _by_image((log_p.exp() * (log_p - log_q)).sum(1))


def confident_smooth_l1(teacher: Tensor, student: Tensor, scores: Tensor) -> Tensor:
    """Smooth L1 distance of box deltas where the teacher is confident, of each
    image [peer: APHQ-ViT].

    Args:
        teacher (Tensor): Deltas of shape (B, anchors * 4, H, W).
        student (Tensor): Same shape.
        scores (Tensor): The teacher's logits, shape (B, anchors * classes, H, W).

    Returns:
        Tensor: Shape (B,); 0 where it is nowhere confident.
    """
    batch, channels, height, width = teacher.shape
    anchors = channels // 4
    best = scores.sigmoid().view(batch, anchors, -1, height, width).amax(2)
    weight = (best > CONFIDENT).to(teacher.dtype)
    distance = F.smooth_l1_loss(student, teacher, reduction='none')
    distance = distance.view(batch, anchors, 4, height, width).mean(2)
    return (weight * distance).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1.)


LOSSES: Dict[str, Callable[..., Tensor]] = dict(
    relative_l1=relative_l1, relative_l2=relative_l2, binary_kl=binary_kl,
    softmax_kl=softmax_kl, confident_smooth_l1=confident_smooth_l1)
"""Name in a config -> distance of two taps."""


def group_of(tap: str) -> str:
    """The group of a tap: what stands before the first dot."""
    return tap.split('.', 1)[0]


def discrepancy(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor],
                weights: Mapping[str, float], losses: Mapping[str, str]) -> Tensor:
    """Weighted sum over taps, of each image.

    Args:
        teacher (Mapping[str, Tensor]): Tap to tensor of shape (B, ...).
        student (Mapping[str, Tensor]): The same taps.
        weights (Mapping[str, float]): Group to weight; taps of other groups
            do not count.
        losses (Mapping[str, str]): Group to a name in :data:`LOSSES`.

    Returns:
        Tensor: D of each image, shape (B,).

    Raises:
        ValueError: If no tap counts.
    """
    parts = []
    for tap, expected in teacher.items():
        group = group_of(tap)
        if not weights.get(group):
            continue
        name = losses.get(group, 'relative_l1')
        arguments = [expected, student[tap]]
        if name == 'confident_smooth_l1':
            arguments.append(teacher['scores' + tap[len(group):]])
        parts.append(weights[group] * LOSSES[name](*arguments))
    if not parts:
        raise ValueError(f'no tap of {", ".join(teacher) or "the model"} has a weight')
    return torch.stack(parts).sum(0)

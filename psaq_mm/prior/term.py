# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a term of the synthesis loss is, and what it may look at."""
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import List, Optional, Sequence

import torch
from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.sections import is_number


def require(fulfilled: bool, key: str, expected: str, value: object) -> None:
    """Raise a :class:`UserError` unless an argument of a term is as expected, after "must be"."""
    if not fulfilled:
        raise UserError(f'synthesis.priors: {key} must be {expected}, got {value!r}')


@dataclass
class AttentionRecord:
    """What one attention block computed in one forward pass.

    Args:
        output (Tensor): attention @ value with the heads kept apart, with shape
            of (num_windows*B, N, heads, head_dim). Window w of image b has the
            index b * num_windows + w.
        valid (Tensor, optional): Boolean with shape of (num_windows, N): False
            for tokens that only pad the feature map. Defaults to None, which
            means that all tokens are real.
    """

    output: Tensor
    valid: Optional[Tensor] = None


@dataclass
class BatchNormRecord:
    """What one BatchNorm layer saw in one forward pass, and what it remembers.

    Mean and biased variance are of its input in this batch, ``running_mean`` and
    ``running_var`` as stored in the layer, with shape of (C, ) each; ``eps`` is what the layer
    adds to variances.
    """

    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float


@dataclass
class TeacherRecord:
    """What one forward pass of the teacher left behind: a record for each attention block, and
    for each BatchNorm layer that ran, in the order of the pass.
    """

    attention: List[AttentionRecord] = field(default_factory=list)
    batch_norms: List[BatchNormRecord] = field(default_factory=list)


@dataclass
class PriorState:
    """What a term may look at in one step.

    Args:
        images (Tensor): Augmented, normalised images that went through the
            model, with shape of (B, 3, H, W).
        attention (list[AttentionRecord]): As of :class:`TeacherRecord`; empty unless a
            term needs it.
        generators (Sequence[torch.Generator]): Source of each image's draws, on
            the CPU, fresh in each step (:func:`psaq_mm.prior.uniform`).
        batch_norms (list[BatchNormRecord]): Likewise.
    """

    images: Tensor
    attention: List[AttentionRecord]
    generators: Sequence[torch.Generator]
    batch_norms: List[BatchNormRecord] = field(default_factory=list)


class PriorTerm(ABC):
    """A weighted term of the loss that images are synthesized with.

    Attributes:
        needs_attention (bool): Whether the term reads ``PriorState.attention``,
            so that a run without such a term need not record it.
        needs_batch_norm (bool): Whether it reads ``PriorState.batch_norms``;
            the heads then run in each step, too.
        couples_images (bool): Whether an image's value depends on what else is
            in the batch. Images then depend on the size of a batch and on the
            number of processes.

    Args:
        weight (float): Factor of the term. Defaults to 1.0.

    Raises:
        UserError: If the weight is not a finite number of at least 0.
    """

    needs_attention: bool = False
    needs_batch_norm: bool = False
    couples_images: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        require(is_number(weight) and weight >= 0, 'weight', 'a number of at least 0', weight)
        self.weight = float(weight)

    @abstractmethod
    def __call__(self, state: PriorState) -> Tensor:
        """The weighted loss of each image, shape (B, ).

        A scalar is taken as the loss of each: it should then be a mean over the images,
        and the term couples them.
        """

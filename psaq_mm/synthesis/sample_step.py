# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The parts of a step that moves images: pure functions of tensors."""
import math
from typing import Dict, Mapping

import torch
from torch import Tensor

from psaq_mm.prior import PriorState, PriorTerm, TeacherRecord, random_flip, random_roll

from psaq_mm.recipe import SynthesisSettings


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak learning rate: linear rise, then half a cosine.

    Args:
        step (int): Step within the phase, from 0.
        steps (int): Steps of the phase.
        warmup (float): Fraction of the phase in which the factor rises.

    Returns:
        float: In (0, 1]. V1 rises over 100 of 500 steps [v1].
    """
    rise = int(round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def augment(images: Tensor, settings: SynthesisSettings, shift: float,
            generator: torch.Generator) -> Tensor:
    """Flip and roll a batch at random, differentiably.

    Args:
        images (Tensor): Shape (B, C, H, W).
        settings (SynthesisSettings): Holds the probability of a flip.
        shift (float): Largest roll, in pixels for a side of 224.
        generator (torch.Generator): Source of the draws.

    Returns:
        Tensor: Same shape.
    """
    height, width = images.shape[-2:]
    images = random_flip(images, settings.flip, generator)
    return random_roll(images, (round(shift * height / 224), round(shift * width / 224)),
                       generator)


def prior_losses(terms: Mapping[str, PriorTerm], images: Tensor, record: TeacherRecord,
                 generator: torch.Generator, step: int) -> Dict[str, Tensor]:
    """The weighted terms of the prior, and their sum.

    Args:
        terms (Mapping[str, PriorTerm]): By their name in the config.
        images (Tensor): As the teacher saw them, shape (B, C, H, W).
        record (TeacherRecord): What its forward pass left behind.
        generator (torch.Generator): Source of the draws.
        step (int): For the message.

    Returns:
        dict[str, Tensor]: A scalar for each term, and ``total``.

    Raises:
        FloatingPointError: If the sum is not finite.
    """
    state = PriorState(images=images, attention=record.attention,
                       batch_norms=record.batch_norms, generator=generator)
    losses = {name: term(state) for name, term in terms.items()}
    losses['total'] = torch.stack(list(losses.values())).sum()
    if not torch.isfinite(losses['total']):
        values = ', '.join(f'{k} {float(v.detach()):g}' for k, v in losses.items()
                           if k != 'total')
        raise FloatingPointError(
            f'the loss of the images is not finite at step {step}: {values}')
    return losses


def gradient_of(loss: Tensor, images: Tensor, step: int, keep_graph: bool = False) -> Tensor:
    """The gradient of a loss with regard to images.

    Args:
        loss (Tensor): A scalar.
        images (Tensor): A leaf that it depends on.
        step (int): For the message.
        keep_graph (bool): Whether another gradient will be taken. Defaults
            to False.

    Returns:
        Tensor: The shape of the images.

    Raises:
        FloatingPointError: If it is not finite.
    """
    gradient, = torch.autograd.grad(loss, images, retain_graph=keep_graph)
    if not torch.isfinite(gradient).all():
        raise FloatingPointError(
            f'the gradient of the images is not finite at step {step}, though the loss is')
    return gradient

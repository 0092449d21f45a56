# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The parts of a step that moves images: pure functions of tensors."""
import math
from typing import Dict, Mapping, Sequence

import torch
from torch import Tensor

from psaq_mm.errors import UserError
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


AUGMENT_DRAWS = 3
"""Random numbers that :func:`augment` takes for an image."""


def augment(images: Tensor, settings: SynthesisSettings, shift: float,
            draws: Tensor) -> Tensor:
    """Flip and roll each image at random, differentiably.

    Args:
        images (Tensor): Shape (B, C, H, W).
        settings (SynthesisSettings): Holds the probability of a flip.
        shift (float): Largest roll, in pixels for a side of 224.
        draws (Tensor): Uniform in [0, 1), float64 with shape of
            (B, AUGMENT_DRAWS), on the CPU.

    Returns:
        Tensor: Same shape.
    """
    height, width = images.shape[-2:]
    images = random_flip(images, settings.flip, draws[:, 0])
    return random_roll(images, (round(shift * height / 224), round(shift * width / 224)),
                       draws[:, 1:])


def prior_losses(terms: Mapping[str, PriorTerm], images: Tensor, record: TeacherRecord,
                 generators: Sequence[torch.Generator], step: int) -> Dict[str, Tensor]:
    """The weighted terms of the prior, and their sum, of each image.

    A descent minimises the sum over the images, so that the gradient of one
    does not depend on how many others there are.

    Args:
        terms (Mapping[str, PriorTerm]): By their name in the config.
        images (Tensor): As the teacher saw them, shape (B, C, H, W).
        record (TeacherRecord): What its forward pass left behind.
        generators (Sequence[torch.Generator]): Source of the draws of each image.
        step (int): For the message.

    Returns:
        dict[str, Tensor]: Shape (B, ) for each term, and ``total``.

    Raises:
        FloatingPointError: If a sum is not finite.
        UserError: If a term gives neither a value for each image nor a scalar.
    """
    state = PriorState(images=images, attention=record.attention,
                       batch_norms=record.batch_norms, generators=generators)
    losses = {name: term(state) for name, term in terms.items()}
    for name, value in losses.items():
        if value.shape not in ((), (len(images), )):
            raise UserError(f'synthesis.priors.{name} must give one value for each of the '
                            f'{len(images)} images, or a scalar, got {tuple(value.shape)}')
        losses[name] = value.expand(len(images))
    losses['total'] = torch.stack(list(losses.values())).sum(0)
    if not torch.isfinite(losses['total']).all():
        values = ', '.join(f'{k} {v:g}' for k, v in means(losses).items() if k != 'total')
        raise FloatingPointError(
            f'the loss of the images is not finite at step {step}: {values}')
    return losses


def means(losses: Mapping[str, Tensor]) -> Dict[str, float]:
    """Of what :func:`prior_losses` gives, over the images: what is logged."""
    return {name: float(value.detach().mean()) for name, value in losses.items()}


def gradient_of(loss: Tensor, images: Tensor, step: int, keep_graph: bool = False) -> Tensor:
    """The gradient of a loss with regard to images.

    Args:
        loss (Tensor): Of each image, shape (B, ); their sum is differentiated.
        images (Tensor): A leaf that it depends on.
        step (int): For the message.
        keep_graph (bool): Whether another gradient will be taken. Defaults
            to False.

    Returns:
        Tensor: The shape of the images.

    Raises:
        FloatingPointError: If it is not finite.
    """
    gradient, = torch.autograd.grad(loss.sum(), images, retain_graph=keep_graph)
    if not torch.isfinite(gradient).all():
        raise FloatingPointError(
            f'the gradient of the images is not finite at step {step}, though the loss is')
    return gradient

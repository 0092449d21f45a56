# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images out of noise, by descent on the prior."""
import copy
import math
from typing import Any, Callable, Dict, List, Optional

import torch
from torch import Tensor

from psaq_mm.prior import PriorState, TeacherRecord, random_flip, random_roll

from .settings import SynthesisSettings


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


class Synthesizer:
    """Makes images batch by batch, one Adam step at a time.

    All randomness comes from one CPU generator, and :meth:`state_dict` holds
    everything that the next step depends on: a restored run continues with
    the same bits.

    Args:
        settings (SynthesisSettings): The ``synthesis`` section.
        teacher (Callable): Runs the teacher on images of shape (B, C, H, W)
            and returns a record of what the terms need. Not called if they
            need nothing.
        lower (Tensor): Smallest valid pixels, shape (1, C, 1, 1).
        upper (Tensor): Largest valid pixels, same shape.
        seed (int): Seed of the generator. Defaults to 0.
        device (torch.device or str): Where the images live. Defaults to
            ``cpu``.
    """

    def __init__(self, settings: SynthesisSettings,
                 teacher: Callable[[Tensor], TeacherRecord], lower: Tensor,
                 upper: Tensor, seed: int = 0, device: Any = 'cpu') -> None:
        self.settings = settings
        self.teacher = teacher
        self.device = torch.device(device)
        self.lower, self.upper = lower.to(self.device), upper.to(self.device)
        self.terms = settings.build_priors()
        self.needs_teacher = any(t.needs_attention or t.needs_batch_norm
                                 for t in self.terms.values())
        self.generator = torch.Generator().manual_seed(seed)
        self.step_index = 0
        self.finished: List[Tensor] = []
        self.losses: Dict[str, List[float]] = {name: [] for name in (*self.terms, 'total')}
        self.current: Optional[Tensor] = None
        self.optimizer: Optional[torch.optim.Adam] = None

    @property
    def total_steps(self) -> int:
        """int: Steps until all images are done."""
        return self.settings.total_steps

    @property
    def done(self) -> bool:
        """bool: Whether all images are done."""
        return self.step_index >= self.total_steps

    def _begin_batch(self, size: int) -> None:
        noise = torch.randn(size, self.lower.shape[1], *self.settings.size,
                            generator=self.generator)
        self._set_current(noise)

    def _set_current(self, images: Tensor) -> None:
        self.current = images.to(self.device).requires_grad_(True)
        self._begin_phase()

    def _begin_phase(self) -> None:
        # V1 starts each phase with a fresh Adam [v1].
        assert self.current is not None
        first, second = self.settings.betas
        self.optimizer = torch.optim.Adam([self.current], lr=self.settings.lr,
                                          betas=(first, second))

    def step(self) -> Dict[str, float]:
        """Take one step, whole or not at all.

        Whatever is raised on the way (Ctrl-C too), images, optimizer and
        generator are then those of the step before.

        Returns:
            dict[str, float]: The weighted value of each term, and ``total``.

        Raises:
            FloatingPointError: If a loss or its gradient is not finite.
        """
        before = self.state_dict()
        try:
            with torch.enable_grad():
                return self._step()
        except BaseException:
            self.load_state_dict(before)
            raise

    def _step(self) -> Dict[str, float]:
        settings = self.settings
        batch, within = divmod(self.step_index, len(settings.shifts) * settings.steps)
        phase, step = divmod(within, settings.steps)
        if within == 0:
            self._begin_batch(settings.batches()[batch])
        elif step == 0:
            self._begin_phase()
        assert self.current is not None and self.optimizer is not None
        for group in self.optimizer.param_groups:
            group['lr'] = settings.lr * learning_rate_factor(step, settings.steps,
                                                             settings.warmup)
        height, width = settings.size
        images = random_flip(self.current, settings.flip, self.generator)
        shift = settings.shifts[phase]
        images = random_roll(images, (round(shift * height / 224), round(shift * width / 224)),
                             self.generator)
        record = self.teacher(images) if self.needs_teacher else TeacherRecord()
        state = PriorState(images=images, attention=record.attention,
                           batch_norms=record.batch_norms, generator=self.generator)
        terms = {name: term(state) for name, term in self.terms.items()}
        total = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(total):
            values = ', '.join(f'{k} {float(v.detach()):g}' for k, v in terms.items())
            raise FloatingPointError(
                f'the loss of the images is not finite at step {self.step_index}: {values}; '
                'lower synthesis.lr, or look at the model for values out of proportion')
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        assert self.current.grad is not None
        if not torch.isfinite(self.current.grad).all():
            raise FloatingPointError(
                f'the gradient of the images is not finite at step {self.step_index}, though the '
                'loss is; look at the model for values out of proportion')
        self.optimizer.step()
        with torch.no_grad():
            self.current.copy_(torch.minimum(torch.maximum(self.current, self.lower),
                                             self.upper))
        self.step_index += 1
        if within + 1 == len(settings.shifts) * settings.steps:
            self.finished.append(self.current.detach().cpu())
            self.current = self.optimizer = None
        losses = {name: float(value.detach()) for name, value in terms.items()}
        losses['total'] = float(total.detach())
        for name, value in losses.items():
            self.losses[name].append(value)
        return losses

    @property
    def images(self) -> Tensor:
        """Tensor: The finished images, normalized, on the CPU, shape
        (num_images, C, H, W)."""
        if not self.finished:
            return torch.empty(0, self.lower.shape[1], *self.settings.size)
        return torch.cat(self.finished)

    def state_dict(self) -> Dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values.

        It is a copy, which later steps leave alone.
        """
        return dict(
            step_index=self.step_index,
            finished=list(self.finished),
            losses={k: list(v) for k, v in self.losses.items()},
            generator=self.generator.get_state(),
            current=None if self.current is None else self.current.detach().clone().cpu(),
            optimizer=copy.deepcopy(self.optimizer.state_dict()) if self.optimizer else None)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step_index = state['step_index']
        self.finished = list(state['finished'])
        self.losses = {k: list(v) for k, v in state['losses'].items()}
        self.current = self.optimizer = None
        if state['current'] is not None:
            self._set_current(state['current'].clone())
            assert self.optimizer is not None
            self.optimizer.load_state_dict(copy.deepcopy(state['optimizer']))
        self.generator.set_state(state['generator'])

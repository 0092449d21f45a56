# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images out of noise, by descent on the prior."""
from typing import Any, Callable, Dict, List, Optional

import torch
from torch import Tensor

from psaq_mm.prior import TeacherRecord

from .pixel_descent import PixelDescent
from .sample_step import augment, gradient_of, learning_rate_factor, prior_losses
from psaq_mm.recipe import SynthesisSettings


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
        self.pixels: Optional[PixelDescent] = None

    @property
    def total_steps(self) -> int:
        """int: Steps until all images are done."""
        return self.settings.total_steps

    @property
    def done(self) -> bool:
        """bool: Whether all images are done."""
        return self.step_index >= self.total_steps

    @property
    def current(self) -> Optional[Tensor]:
        """Tensor, optional: The images of the batch in the making."""
        return None if self.pixels is None else self.pixels.images

    @property
    def optimizer(self) -> Optional[torch.optim.Optimizer]:
        """torch.optim.Optimizer, optional: That of the batch in the making."""
        return None if self.pixels is None else self.pixels.optimizer

    def _begin_batch(self, size: int) -> None:
        noise = torch.randn(size, self.lower.shape[1], *self.settings.size,
                            generator=self.generator)
        self._set_current(noise)

    def _set_current(self, images: Tensor) -> None:
        self.pixels = PixelDescent(images, self.lower, self.upper, self.settings.betas)

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
        except BaseException as error:
            self.load_state_dict(before)
            if isinstance(error, FloatingPointError):
                raise FloatingPointError(f'{error}; lower synthesis.lr, or look at the model for '
                                         'values out of proportion') from error
            raise

    def _step(self) -> Dict[str, float]:
        settings = self.settings
        batch, within = divmod(self.step_index, len(settings.shifts) * settings.steps)
        phase, step = divmod(within, settings.steps)
        if within == 0:
            self._begin_batch(settings.batches()[batch])
        elif step == 0 and self.pixels is not None:
            self.pixels.restart()
        assert self.pixels is not None
        images = augment(self.pixels.images, settings, settings.shifts[phase], self.generator)
        record = self.teacher(images) if self.needs_teacher else TeacherRecord()
        losses = prior_losses(self.terms, images, record, self.generator, self.step_index)
        self.pixels.step(gradient_of(losses['total'], self.pixels.images, self.step_index),
                         settings.lr * learning_rate_factor(step, settings.steps,
                                                            settings.warmup))
        self.step_index += 1
        if within + 1 == len(settings.shifts) * settings.steps:
            self.finished.append(self.pixels.images.detach().cpu())
            self.pixels = None
        values = {name: float(value.detach()) for name, value in losses.items()}
        for name, value in values.items():
            self.losses[name].append(value)
        return values

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
            pixels=None if self.pixels is None else self.pixels.state_dict())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step_index = state['step_index']
        self.finished = list(state['finished'])
        self.losses = {k: list(v) for k, v in state['losses'].items()}
        self.pixels = None
        if state['pixels'] is not None:
            self._set_current(state['pixels']['images'])
            assert self.pixels is not None
            self.pixels.load_state_dict(state['pixels'])
        self.generator.set_state(state['generator'])

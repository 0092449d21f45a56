# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images out of noise, by descent on the prior."""
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.prior import TeacherRecord, derived_seed, uniform
from psaq_mm.recipe import SynthesisSettings

from .pixel_descent import PixelDescent
from .sample_step import (
    AUGMENT_DRAWS,
    augment,
    gradient_of,
    learning_rate_factor,
    means,
    prior_losses,
)


def share_of(num_images: int, rank: int, processes: int) -> range:
    """Numbers of the images that one of several processes makes.

    Args:
        num_images (int): How many all of them make.
        rank (int): Number of this process, from 0.
        processes (int): How many there are.

    Returns:
        range: Neighbours; the shares differ by one image at most, and joined in
        the order of ranks they are all images in order.
    """
    first, end = (-(-num_images * number // processes) for number in (rank, rank + 1))
    return range(first, end)


class Synthesizer:
    """Makes images batch by batch, one Adam step at a time.

    Image i of a run depends on the seed and on i: not on what it is made together
    with, nor on how the images are split into batches and among processes, but for
    rounding, and for terms of the prior that couple images. The descent magnifies
    rounding; batches of the same images have the same bits in any process.
    :meth:`state_dict` holds everything that the next step depends on: a restored
    run continues with the same bits.

    Args:
        settings (SynthesisSettings): The ``synthesis`` section.
        teacher (Callable): Runs the teacher on images of shape (B, C, H, W)
            and returns a record of what the terms need. Not called if they
            need nothing.
        lower (Tensor): Smallest valid pixels, shape (1, C, 1, 1).
        upper (Tensor): Largest valid pixels, same shape.
        seed (int): Seed of the run. Defaults to 0.
        device (torch.device or str): Where the images live. Defaults to
            ``cpu``.
        indices (Sequence[int], optional): Numbers of the images to make
            (:func:`share_of`), ``batch_size`` at a time. Defaults to None: all of
            ``num_images``.
    """

    def __init__(self, settings: SynthesisSettings,
                 teacher: Callable[[Tensor], TeacherRecord], lower: Tensor,
                 upper: Tensor, seed: int = 0, device: Any = 'cpu',
                 indices: Optional[Sequence[int]] = None) -> None:
        self.settings = settings
        self.indices = list(range(settings.num_images) if indices is None else indices)
        self.seed = seed
        self.teacher = teacher
        self.device = torch.device(device)
        self.lower, self.upper = lower.to(self.device), upper.to(self.device)
        self.terms = settings.build_priors()
        self.needs_teacher = any(t.needs_attention or t.needs_batch_norm
                                 for t in self.terms.values())
        for name, term in self.terms.items():
            if term.couples_images:
                print_log(f'synthesis.priors.{name} looks at batches as a whole: the images '
                          'depend on synthesis.batch_size and on the number of processes',
                          logger='current')
        self.step_index = 0
        self.finished: List[Tensor] = []
        self.losses: Dict[str, List[float]] = {name: [] for name in (*self.terms, 'total')}
        self.pixels: Optional[PixelDescent] = None

    @property
    def total_steps(self) -> int:
        """int: Steps until all images are done."""
        batches = -(-len(self.indices) // self.settings.batch_size)
        return batches * len(self.settings.shifts) * self.settings.steps

    @property
    def done(self) -> bool:
        """bool: Whether all images are done."""
        return self.step_index >= self.total_steps

    @property
    def current(self) -> Optional[Tensor]:
        """Tensor, optional: The images of the batch in the making."""
        return None if self.pixels is None else self.pixels.images

    def _begin_batch(self, batch: int) -> None:
        size = self.settings.batch_size
        seeds = [derived_seed(self.seed, index)
                 for index in self.indices[batch * size:(batch + 1) * size]]
        noise = [torch.randn(self.lower.shape[1], *self.settings.size, dtype=torch.float32,
                             generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.pixels = PixelDescent(torch.stack(noise), seeds, self.lower, self.upper,
                                   self.settings.betas)

    def step(self) -> Dict[str, float]:
        """Take one step, whole or not at all.

        Whatever is raised on the way (Ctrl-C too), images and optimizer are then
        those of the step before.

        Returns:
            dict[str, float]: The weighted value of each term, and ``total``: means
            over the images of the batch.

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
            self._begin_batch(batch)
        elif step == 0 and self.pixels is not None:
            self.pixels.restart()
        assert self.pixels is not None
        generators = self.pixels.generators()
        images = augment(self.pixels.images, settings, settings.shifts[phase],
                         uniform(generators, AUGMENT_DRAWS))
        record = self.teacher(images) if self.needs_teacher else TeacherRecord()
        losses = prior_losses(self.terms, images, record, generators, self.step_index)
        self.pixels.step(gradient_of(losses['total'], self.pixels.images, self.step_index),
                         settings.lr * learning_rate_factor(step, settings.steps,
                                                            settings.warmup))
        self.step_index += 1
        if within + 1 == len(settings.shifts) * settings.steps:
            self.finished.append(self.pixels.images.detach().cpu())
            self.pixels = None
        values = means(losses)
        for name, value in values.items():
            self.losses[name].append(value)
        return values

    @property
    def images(self) -> Tensor:
        """Tensor: The finished images, normalized, on the CPU, shape
        (len(indices), C, H, W) at the end."""
        if not self.finished:
            return torch.empty(0, self.lower.shape[1], *self.settings.size)
        return torch.cat(self.finished)

    def state_dict(self) -> Dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values.

        It is a copy, which later steps leave alone.
        """
        return dict(
            seed=self.seed,
            indices=list(self.indices),
            step_index=self.step_index,
            finished=list(self.finished),
            losses={k: list(v) for k, v in self.losses.items()},
            pixels=None if self.pixels is None else self.pixels.state_dict())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            UserError: If it is of other images.
        """
        if state['indices'] != self.indices:
            raise UserError('the saved images are another share of the run: resume with as many '
                            'processes as before, or start anew')
        self.seed = state['seed']
        self.step_index = state['step_index']
        self.finished = list(state['finished'])
        self.losses = {k: list(v) for k, v in state['losses'].items()}
        self.pixels = None
        if state['pixels'] is not None:
            self.pixels = PixelDescent.restored(state['pixels'], self.lower, self.upper,
                                                self.settings.betas)

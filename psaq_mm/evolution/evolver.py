# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The adaptive teacher-student game, one step at a time.

V2 says that generated samples and quantized model evolve in turn, competing
and interacting, under the teacher [paper]. Loss, schedule and bounds are
ours [choice]; docs/method.md lists them.
"""
import copy
import math
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from mmengine.dist import all_gather, broadcast, get_rank, get_world_size
from torch import Tensor

from psaq_mm.adapters import TapRecord
from psaq_mm.prior import TeacherRecord, uniform
from psaq_mm.processes import stopping_together
from psaq_mm.recipe import EvolutionSettings, SynthesisSettings
from psaq_mm.synthesis.pixel_descent import PixelDescent
from psaq_mm.synthesis.sample_step import (
    AUGMENT_DRAWS,
    augment,
    gradient_of,
    learning_rate_factor,
    means,
    prior_losses,
)

from .adversary import bounded_factor
from .image_buffer import ImageBuffer
from .learner import StudentLearner
from .views import random_blend, random_zoom

Teacher = Callable[[Tensor], Tuple[TeacherRecord, TapRecord]]


class Evolver:
    """Lets images and student evolve against each other.

    A round is ``sample_steps`` steps of a batch of images, down the prior and
    up the discrepancy, and then ``student_steps`` steps of the student down
    the discrepancy on old and new images. Before the first round and at the
    end of each D is measured on the images of the warm start; the game ends
    early if it rises for ``patience`` rounds, and the student of the best
    round is kept, or the calibrated one if no round makes it better.

    All randomness comes from one CPU generator, the same in each process, and the
    images of a round draw from seeds of their own, which come from it: what is
    drawn does not depend on the number of processes, each of which takes its part
    of every batch. :meth:`state_dict` holds everything that the next step depends
    on.

    Args:
        settings (EvolutionSettings): The ``evolution`` section.
        synthesis (SynthesisSettings): The ``synthesis`` section: the prior
            and its augmentation.
        teacher (Callable): Runs the teacher on images of shape (B, C, H, W);
            gives what the prior needs, and its taps.
        student (StudentLearner): The quantized side.
        images (Tensor): Of the warm start, shape (N, C, H, W).
        lower (Tensor): Smallest valid pixels, shape (1, C, 1, 1).
        upper (Tensor): Largest valid pixels, same shape.
        seed (int): Seed of the generator. Defaults to 0.
        device (torch.device or str): Where the models are. Defaults to
            ``cpu``.

    Raises:
        UserError: If a batch cannot be split evenly among the processes.
    """

    def __init__(self, settings: EvolutionSettings, synthesis: SynthesisSettings,
                 teacher: Teacher, student: StudentLearner, images: Tensor, lower: Tensor,
                 upper: Tensor, seed: int = 0, device: Any = 'cpu') -> None:
        self.settings, self.synthesis = settings, synthesis
        self.teacher, self.student = teacher, student
        self.device = torch.device(device)
        self.lower, self.upper = lower.to(self.device), upper.to(self.device)
        self.terms = synthesis.build_priors()
        self.generator = torch.Generator().manual_seed(seed)
        self.buffer = ImageBuffer(images.detach().cpu(), settings.buffer_size)
        self.world, self.rank = get_world_size(), get_rank()
        settings.require_even_batches(self.world)
        self.step_index = 0
        self.stopped = False
        self.consistent = True
        """bool: False while a step is changing the state."""
        self.pixels: Optional[PixelDescent] = None
        self.losses: Dict[str, List[float]] = {}
        """dict[str, list[float]]: Values of sample steps (``sample/...``), of
        student steps (``student/...``) and of rounds (``round/...``; the first
        is of the calibrated student)."""
        self.best: Optional[Dict[str, Any]] = None

    @property
    def steps_per_round(self) -> int:
        """int: Steps of both kinds."""
        return self.settings.sample_steps + self.settings.student_steps

    @property
    def total_steps(self) -> int:
        """int: Steps of all rounds."""
        return self.settings.rounds * self.steps_per_round

    @property
    def done(self) -> bool:
        """bool: Whether the game has ended."""
        return self.stopped or self.step_index >= self.total_steps

    @property
    def best_round(self) -> int:
        """int: The round whose student is kept, from 1; 0 for the calibrated one."""
        values = self.losses['round/discrepancy']
        return max(i for i, value in enumerate(values) if value == min(values))

    def step(self) -> Dict[str, float]:
        """Take the next step, of the images or of the student.

        Returns:
            dict[str, float]: Its losses, by name; ``discrepancy`` is D before
            the step, and a sample step also has the terms of the prior.

        Raises:
            FloatingPointError: If a loss or gradient is not finite. The state
                is then that of the step before; after the last step of a
                round, whose student can be measured only when it has changed,
                the student is that of the best round.
        """
        before = self.generator.get_state()
        round_index, within = divmod(self.step_index, self.steps_per_round)
        try:
            if self.step_index == 0:
                self._measure_round()
            if within < self.settings.sample_steps:
                kind, losses = 'sample', self._sample_step(within)
            else:
                kind, losses = 'student', self._student_step(round_index, within)
        except BaseException as error:  # Ctrl-C too
            if self.consistent:  # nothing has moved yet: go back to the step before
                self.generator.set_state(before)
                self.student.forget_gradients()
                if within == 0:
                    self.pixels = None
                if self.step_index == 0:
                    self.losses, self.best = {}, None
            if not isinstance(error, FloatingPointError):
                raise
            advice = ('lower evolution.weight_lr, range_lr or sample_lr' if self.step_index else
                      'nothing was learned yet: the weights or the range rule are the cause')
            raise FloatingPointError(f'evolution, step {self.step_index} (round '
                                     f'{round_index + 1}): {error}; {advice}') from error
        for name, value in losses.items():
            self.losses.setdefault(f'{kind}/{name}', []).append(value)
        self.step_index += 1
        if within + 1 == self.settings.sample_steps:
            self._end_sampling()
        if within + 1 == self.steps_per_round:
            losses['round'] = self._end_round()
        self.consistent = True
        return losses

    def _local(self, batch: Tensor) -> Tensor:
        """This process's part of what a batch has for each image."""
        size = len(batch) // self.world
        return batch[self.rank * size:(self.rank + 1) * size]

    def _change(self) -> None:
        self.consistent = False

    def _sample_step(self, within: int) -> Dict[str, float]:
        settings, synthesis = self.settings, self.synthesis
        if within == 0:
            start = self.buffer.draw(settings.batch_size, 0., self.generator)
            seeds = torch.randint(2**63 - 1, (settings.batch_size, ), generator=self.generator)
            self.pixels = PixelDescent(self._local(start), self._local(seeds).tolist(),
                                       self.lower, self.upper, synthesis.betas)
        assert self.pixels is not None
        with stopping_together():
            gradient, values = self._sample_gradient(self.pixels)
        self._change()
        self.pixels.step(gradient, settings.sample_lr * learning_rate_factor(
            within, settings.sample_steps, synthesis.warmup))
        return values

    def _sample_gradient(self, pixels: PixelDescent) -> Tuple[Tensor, Dict[str, float]]:
        """Where the images should not go, and the losses."""
        settings, synthesis = self.settings, self.synthesis
        self.student.require_grad(False)
        with torch.enable_grad():
            generators = pixels.generators()
            images = augment(pixels.images, synthesis, synthesis.shifts[-1],
                             uniform(generators, AUGMENT_DRAWS))
            record, taps = self.teacher(images)
            losses = prior_losses(self.terms, images, record, generators, self.step_index)
            gradient = gradient_of(losses['total'], pixels.images, self.step_index,
                                   keep_graph=settings.competes)
            values = means(losses)
            if settings.competes:
                distance = self.student.discrepancy(taps, images)
                term = -settings.adversarial_weight * torch.log1p(distance)
                pull = gradient_of(term, pixels.images, self.step_index)
                factor = bounded_factor(gradient, pull, settings.adversarial_fraction)
                gradient = gradient + factor * pull
                values['discrepancy'] = float(distance.detach().mean())
                values['adversarial_factor'] = float(factor.mean())
        return gradient, values

    def _end_sampling(self) -> None:
        """Add the images of the round to the buffer."""
        assert self.pixels is not None
        parts = all_gather(self.pixels.images.detach())
        self.buffer.add(torch.cat([part.cpu() for part in parts]))
        self.pixels = None

    def _student_step(self, round_index: int, within: int) -> Dict[str, float]:
        settings = self.settings
        batch = self.buffer.draw(settings.batch_size, settings.new_fraction, self.generator)
        views = random_zoom(batch.to(self.device), settings.zoom, self.generator)
        views = random_blend(views, settings.contrast, self.lower, self.upper, self.generator)
        draws = torch.rand(len(views), AUGMENT_DRAWS, generator=self.generator,
                           dtype=torch.float64)
        images = augment(self._local(views), self.synthesis, self.synthesis.shifts[-1],
                         self._local(draws))
        with torch.no_grad():
            _, taps = self.teacher(images)
        step = round_index * settings.student_steps + within - settings.sample_steps
        factor = learning_rate_factor(step, settings.rounds * settings.student_steps, 0.)
        self.student.require_grad(True)
        with torch.enable_grad():
            value = self.student.step(taps, images, factor, self._change)
        return dict(discrepancy=value)

    def measure(self) -> float:
        """D on the images of the warm start, the mean over them."""
        self.student.require_grad(False)
        total = 0.
        with torch.no_grad():
            for batch in self.buffer.first.split(self.settings.batch_size):
                images = batch.to(self.device)
                total += float(self.student.discrepancy(self.teacher(images)[1], images).sum())
        return total / len(self.buffer.first)

    def _measure_round(self) -> float:
        """Measure, and remember the best student."""
        shared = torch.tensor(self.measure(), dtype=torch.float64)
        broadcast(shared)  # rounded otherwise elsewhere, another round could be the best there
        value = float(shared)
        if not math.isfinite(value):
            raise FloatingPointError(f'the discrepancy is {value:g}')
        values = self.losses.setdefault('round/discrepancy', [])
        values.append(value)
        if value <= min(values):
            self.best = self.student.learned()
        return value

    def _end_round(self) -> float:
        """Measure, and stop if the student gets worse."""
        try:
            value = self._measure_round()
        except FloatingPointError as error:
            self.finish()
            raise FloatingPointError(f'evolution: after step {self.step_index} {error}; lower '
                                     'evolution.weight_lr or range_lr') from error
        patience = self.settings.patience
        last = self.losses['round/discrepancy'][-patience - 1:]
        self.stopped = len(last) > patience and all(a < b for a, b in zip(last, last[1:]))
        return value

    def finish(self) -> None:
        """Give the student what the best round had learned."""
        if self.best is not None:
            self.student.restore(self.best)
        self.student.require_grad(False)

    def state_dict(self) -> Dict[str, Any]:
        """Everything that the next step depends on: tensors and plain values."""
        return copy.deepcopy(dict(
            step_index=self.step_index, stopped=self.stopped, losses=self.losses,
            generator=self.generator.get_state(), buffer=self.buffer.state_dict(),
            student=self.student.state_dict(), best=self.best,
            pixels=None if self.pixels is None else self.pixels.state_dict()))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        state = copy.deepcopy(state)
        self.step_index, self.stopped = state['step_index'], state['stopped']
        self.losses, self.best = state['losses'], state['best']
        self.generator.set_state(state['generator'])
        self.buffer.load_state_dict(state['buffer'])
        self.student.load_state_dict(state['student'])
        self.pixels = None
        if state['pixels'] is not None:
            self.pixels = PixelDescent.restored(state['pixels'], self.lower, self.upper,
                                                self.synthesis.betas)

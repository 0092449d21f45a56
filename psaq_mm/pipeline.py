# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The order of the steps, and the state between them.

    float model -> images -> equalized teacher -> bits of each module (if there is a budget)
    -> calibrated student -> game (if there are rounds) -> ranges at the size of test images
    -> blocks that learn (if there are steps) -> rounded weights

:func:`quantize` does it from Python; ``PSAQRunner`` does the same with mmengine's work
directory, logger, hooks and launcher. Nothing else knows the order.
"""
import copy
import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Tuple, Union

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.logging import print_log
from torch import Tensor, nn

from .adapters import find_adapter
from .adapters.tested_size import SizeFound, tested_size
from .errors import UserError
from .evolution import Evolver, check_evolution, evolver
from .ops import named_quant_ops, ops_to_round, plan_quantization
from .peak_memory import forget_peak, peak_bytes
from .processes import count_of_this_process, indices_of_this_process, stopping_together
from .recipe import QuantizationSettings, Recipe
from .recipe.checks import check_model, check_progress, check_seed, sides
from .saved_run import SavedRun, hash_of
from .student import (
    Allocation,
    Allocator,
    calibrate,
    check_budget,
    equalize,
    has_learned_ranges,
    measure_tap_error,
    prepare,
    recalibrate,
    recalibration_count,
    reconstructor,
    round_weights,
)
from .student.history import require_float, require_images
from .synthesis import (
    Synthesizer,
    check_synthesis,
    mosaic_count,
    mosaics,
    share_of,
    sized_for,
    synthesizer,
)

Size = Tuple[int, int]

HELD_OUT = 2
"""Images that ``quantization.max_drop`` is checked on [choice]."""


@dataclass(frozen=True)
class Progress:
    """How far a quantization is.

    Args:
        phase (str): ``synthesis``, ``allocation``, ``calibration``, ``evolution``,
            ``final_ranges``, ``reconstruction``, ``rounding`` or ``held_out``.
        done (int): Steps or images that are done.
        total (int): Of how many.
        losses (dict[str, float]): Those of the last step, by name; empty where there are
            none. Defaults to none.
    """
    phase: str
    done: int
    total: int
    losses: Mapping[str, float] = field(default_factory=dict)


def quantize(model: nn.Module, recipe: Optional[Recipe] = None, seed: int = 0,
             test_size: Optional[Size] = None,
             progress: Optional[Callable[[Progress], None]] = None,
             state_file: Union[None, str, Path] = None, resume: bool = False,
             images: Optional[Tensor] = None, mix: bool = False) -> nn.Module:
    """Quantize a float model without data: all that ``tools/quantize.py`` does.

        student = psaq_mm.quantize(model, psaq_mm.Recipe.shipped('w4a4'))
        psaq_mm.save(student, 'quantized.pth')

    Args:
        model (nn.Module): A detector or segmentor with a Swin backbone, a Swin or DeiT
            of timm, or the backbone alone, with its weights. It stays as it is.
        recipe (Recipe, optional): What is done. Defaults to None: the defaults, which
            are the preset ``default`` at W8A8.
        seed (int): Seed of all randomness, from 0. Defaults to 0.
        test_size (tuple[int, int], optional): Height and width in pixels of what the model
            sees of a test image, for ``calibration.image_size='test'``. Defaults to None:
            what the test pipeline of ``model.cfg`` says, if the model has one.
        progress (Callable, optional): Called as a phase begins, and after each of its steps or
            batches. Defaults to None.
        state_file (str or Path, optional): File that the state is saved to now and then.
            Defaults to None: it is not.
        resume (bool): Whether to go on from ``state_file``; an interrupted run then ends
            with the same bits on the CPU. Defaults to False.
        images (Tensor, optional): Normalized images of shape (N, C, H, W), in the place of
            synthetic ones, such as those of :func:`psaq_mm.load_images`. Defaults to None:
            images are made from the model.
        mix (bool): Whether synthetic images are made too, and stand beside ``images`` as
            mosaics of their size. Defaults to False.

    Returns:
        nn.Module: The student: another model, quantized, in evaluation mode.

    Raises:
        UserError: If the model cannot be quantized so, or a file is of another run.
        FloatingPointError: If a loss is not finite.
    """
    check_model(model)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise UserError("recipe must be a psaq_mm.Recipe such as Recipe.shipped('w4a4'), got "
                        f'{recipe!r}')
    found: Optional[SizeFound] = None
    if test_size is not None:
        found = SizeFound(sides(test_size, '(height, width)'), 'test_size')
    elif getattr(model, 'cfg', None) is not None:
        found = tested_size(model.cfg)
    with torch.inference_mode(False):  # else nothing would have gradients
        return Pipeline(copy.deepcopy(model), recipe or Recipe(), seed, found, progress,
                        state_file, resume, images=images, mix=mix).run()


def check(model: nn.Module, recipe: Recipe, processes: int = 1,
          meta: Optional[Mapping[str, Any]] = None) -> None:
    """Raise for what is wrong with a model or recipe, before any heavy work.

    ``meta`` is that of :class:`Pipeline`.

    Raises:
        UserError: If the float model cannot be quantized so, whatever its weights, or so many
            processes cannot share the images evenly.
    """
    require_float(model, 'quantize')
    check_synthesis(model, recipe.synthesis)
    plan = plan_quantization(model, recipe.quantization, find_adapter(model))
    if recipe.quantization.scope == 'model':
        find_adapter(model).check_forward(model)
    if recipe.quantization.budget:
        check_budget(model, recipe.quantization, meta)
    check_evolution(model, recipe.evolution, plan)
    if recipe.calibration.size is not None:
        find_adapter(model).check_image_size(model, recipe.calibration.size,
                                             'calibration.image_size')
    recipe.synthesis.require_images_for(processes)
    recipe.evolution.require_even_batches(processes)


def check_images(model: nn.Module, images: object) -> None:
    """Raise unless a float model can take these images in the place of synthetic ones.

    Raises:
        UserError: If they are not finite, or not normalized images of shape (N, C, H, W) of a
            size that it takes.
    """
    found = require_images(model, images, 'quantize')
    if not found.isfinite().all():
        raise UserError('images have values that are not finite')
    find_adapter(model).check_image_size(model, (found.shape[-2], found.shape[-1]),
                                         'the size of the images')


class Pipeline:
    """One quantization: its models, its images, and which step comes next.

    Other arguments are those of :func:`quantize`. Of several processes each has a state
    file of its own, and all have the same images.

    Args:
        teacher (nn.Module): The float model; equalization changes it in place.
        test_size (SizeFound, optional): Of test images, for
            ``calibration.image_size='test'``. Defaults to None: not known.
        identity (Mapping, optional): What a resumed run must have in common with the first,
            beside seed and settings, by name. Defaults to None: a hash of the weights.
        meta (Mapping, optional): What :func:`psaq_mm.save` will be given, which
            ``quantization.target_size`` has to hold too. Defaults to None.
    """

    def __init__(self, teacher: nn.Module, recipe: Recipe, seed: int = 0,
                 test_size: Optional[SizeFound] = None,
                 progress: Optional[Callable[[Progress], None]] = None,
                 state_file: Union[None, str, Path] = None, resume: bool = False,
                 identity: Optional[Mapping[str, Any]] = None,
                 images: Optional[Tensor] = None, mix: bool = False,
                 meta: Optional[Mapping[str, Any]] = None) -> None:
        self.teacher, self.recipe, self.seed = teacher, recipe, seed
        self.test_size = test_size or SizeFound(None, 'the model has no config')
        check_progress(progress)
        self.progress = progress
        if resume and state_file is None:
            raise UserError('resume=True needs the state_file to go on from')
        if mix and images is None:
            raise UserError('mix=True needs the images that synthetic ones are to stand beside')
        self.saved: Optional[SavedRun] = None
        self._saving = None if state_file is None else (state_file, resume, identity)
        self.student: nn.Module = teacher
        """nn.Module: The teacher itself until the student is made of a copy of it."""
        self.images = torch.empty(0)
        """Tensor: The images, normalized, on the CPU; of all processes."""
        self.allocation: Optional[Allocation] = None
        """Allocation, optional: Bits of each module, if they were chosen for a budget."""
        self.measured: Optional[float] = None
        """float, optional: What :attr:`Allocation.predicted` predicts, measured."""
        self._given_images, self._mix, self._meta = images, mix, meta
        self.seconds: Dict[str, float] = {}
        """dict[str, float]: Wall seconds of each phase."""
        self.memory: Dict[str, Dict[str, int]] = {}
        """dict[str, dict[str, int]]: Peaks of each phase, as of
        :func:`~psaq_mm.peak_memory.peak_bytes`."""
        self._phase_name, self._counted_at = '', 0.

    def notify(self, point: str, **arguments: Any) -> None:
        """Called at each point of a run; for subclasses."""

    def _begin(self, phase: str, done: int, of: int, **arguments: Any) -> None:
        with stopping_together():
            self.notify(f'before_{phase}', **arguments)
            self._report(phase, done, of)

    def _end(self, phase: str, **arguments: Any) -> None:
        with stopping_together():
            self.notify(f'after_{phase}', **arguments)

    def extra_state(self) -> Dict[str, Any]:
        """What is saved beside the state, in plain values and tensors; for subclasses."""
        return dict(memory={phase: dict(peaks) for phase, peaks in self.memory.items()})

    def load_extra_state(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`extra_state`: as the synthesis begins, and the evolution."""
        for phase, peaks in state.get('memory', {}).items():
            self._note_peaks(phase, peaks)

    def run(self) -> nn.Module:
        """Take all steps.

        Returns:
            nn.Module: The student.
        """
        with stopping_together():
            check_seed(self.seed, 'seed')
            check(self.teacher, self.recipe, get_world_size(), self._meta)
            if self.recipe.calibration.image_size == 'test' and self.test_size.size is not None:
                adapter, size = find_adapter(self.teacher), self.test_size.size
                taken = adapter.taken_size(self.teacher, size)
                if taken != size:
                    self.test_size = SizeFound(
                        taken, f'{self.test_size.source}, padded to what the model takes')
                adapter.check_image_size(self.teacher, taken, 'the size of test images')
            if self._given_images is not None:
                check_images(self.teacher, self._given_images)
        self.recipe = replace(self.recipe,
                              synthesis=sized_for(self.teacher, self.recipe.synthesis))
        if self._saving is not None:
            path, resume, identity = self._saving
            identity = dict(identity or dict(weights=hash_of(self.teacher.state_dict())))
            given = self._given_images
            identity['images'] = None if given is None \
                else hash_of({'mixed' if self._mix else 'alone': given})
            with stopping_together():  # each process has a file of its own
                self.saved = SavedRun(path, resume, self.recipe, self.seed, identity)
        self._make_images()
        self._calibrate(self._choose_bits())
        self._evolve()
        self._set_final_ranges()
        self._reconstruct()
        self._round_weights()
        self._check_prediction()
        return self.student

    @property
    def final_size(self) -> Size:
        """tuple[int, int]: Height and width that the last ranges are set at."""
        calibration = self.recipe.calibration
        size = self.test_size.size if calibration.image_size == 'test' else calibration.size
        return size or (self.images.shape[-2], self.images.shape[-1])

    @property
    def sources(self) -> Dict[str, int]:
        """dict[str, int]: How many images are one's ``own``, how many ``synthetic`` (as they
        were made, before they became mosaics)."""
        own, made = self._given_images, self.recipe.synthesis.num_images
        return dict(own=0 if own is None else len(own),
                    synthetic=made if own is None or self._mix else 0)

    @property
    def _batch_size(self) -> int:
        """int: Images in a forward pass: given ones may be larger than synthetic ones."""
        (height, width), most = self.recipe.synthesis.size, self.recipe.calibration.batch_size
        own = self.images.shape[-2] * self.images.shape[-1]
        return max(1, min(most, most * height * width // own))

    def _make_images(self) -> None:
        given = self._given_images
        if given is None or self._mix:
            self._synthesize()
        elif self.saved is not None:
            self.seconds.update(self.saved.restore_images())
        if given is None:
            return
        given, height, width = given.detach().cpu(), *given.shape[-2:]
        made = mosaics(self.images, (height, width)) if self._mix else given[:0]
        self.images = torch.cat([given, made])  # a copy: no inference tensor
        print_log(f'images: {len(given)} own of {height}x{width}' + (
            f', {self.sources["synthetic"]} synthetic as {len(made)} of that size'
            if self._mix else ''), logger='current')

    def _synthesize(self) -> None:
        settings = self.recipe.synthesis
        indices = share_of(settings.num_images, get_rank(), get_world_size())
        with self._phase('synthesis'), \
                synthesizer(self.teacher, settings, self.seed, indices) as images:
            if self.saved is not None:
                self.seconds.update(self.saved.restore_images(images))
                self.load_extra_state(self.saved.extra_of_images)
            print_log('size of synthetic images: {}x{}'.format(*settings.size), logger='current')
            self._begin('synthesis', images.step_index, images.total_steps, synthesizer=images)
            with stopping_together():
                try:
                    while not images.done:
                        losses = images.step()
                        self.notify('after_synthesis_step', synthesizer=images, losses=losses)
                        self._report('synthesis', images.step_index, images.total_steps, losses)
                        if images.step_index % settings.save_interval == 0 or images.done:
                            self._save_images(images)
                except BaseException:  # Ctrl-C too: keep what is done
                    self.notify('interrupt_synthesis', synthesizer=images)
                    if images.step_index:
                        self._save_images(images, stopped=True)
                    raise
            self.images = torch.cat(all_gather_object(images.images))
            self._end('synthesis', synthesizer=images)

    def _choose_bits(self) -> QuantizationSettings:
        """Equalize the teacher; choose bits if there is a budget.

        Returns:
            QuantizationSettings: What the student is prepared by.
        """
        quantization, batch_size = self.recipe.quantization, self._batch_size
        if quantization.channel_limit is not None:
            with self._phase('calibration'):
                equalize(self.teacher, self.images, quantization, batch_size)
        if not quantization.budget:
            return quantization
        allocator = Allocator(self.teacher, quantization, self._meta)
        groups = None if self.saved is None else self.saved.restore_sensitivity()
        total = len(indices_of_this_process(len(self.images))) if groups is None else 0
        with self._phase('allocation'), self._batches('allocation', total) as progress:
            if groups is None:
                groups = allocator.measure(self.images, self.seed, batch_size, progress)
            self.allocation = allocator.choose(groups)
        if self.saved is not None:
            self.saved.save_sensitivity(groups, self.seconds)
        print_log(f'{quantization.budget}: weights have '
                  f'{self.allocation.mean_bits(True):.2f} bits on the average, activations '
                  f'{self.allocation.mean_bits(False):.2f}; predicted: '
                  f'{100 * self.allocation.predicted:.3g} % of the power of the outputs becomes '
                  'error', logger='current')
        return self.allocation.settings

    def _check_prediction(self) -> None:
        """Measure what the allocation predicts: for ``max_drop`` on images that nothing else
        has seen."""
        if self.allocation is None:
            return
        most, images, where = self.recipe.quantization.max_drop, self.images, 'the images'
        with self._phase('allocation'):
            if most is not None:
                images, where = self._held_out(), f'{HELD_OUT} held-out images'
            self.measured = measure_tap_error(self.student, self.teacher, images)
        missed = most is not None and 100 * self.measured > most
        print_log(f'predicted error: {100 * self.allocation.predicted:.3g} %, measured on {where}:'
                  f' {100 * self.measured:.3g} %' + (
                      f', which is over max_drop={most:g}: give a smaller one' if missed else ''),
                  logger='current', level=logging.WARNING if missed else logging.INFO)

    def _held_out(self) -> Tensor:
        """Synthetic images beyond those that the student is made on."""
        settings, first = self.recipe.synthesis, self.recipe.synthesis.num_images
        print_log(f'making {HELD_OUT} images more, to check max_drop', logger='current')
        settings = replace(settings, num_images=first + HELD_OUT)
        with synthesizer(self.teacher, settings, self.seed,
                         range(first, first + HELD_OUT)) as images, stopping_together():
            self._report('held_out', images.step_index, images.total_steps)
            while not images.done:
                losses = images.step()
                self._report('held_out', images.step_index, images.total_steps, losses)
            return images.images

    def _calibrate(self, quantization: QuantizationSettings) -> None:
        batch_size = self._batch_size
        with self._phase('calibration'):
            self.student = prepare(self.teacher, quantization)
            with self._batches('calibration',
                               count_of_this_process(len(self.images))) as progress:
                calibrate(self.student, self.images, batch_size, progress)

    def _evolve(self) -> None:
        settings = self.recipe.evolution
        if not settings.rounds:
            return
        with self._phase('evolution'), evolver(
                self.student, self.teacher, self.images, settings, self.recipe.synthesis,
                self.seed) as game:
            extra = None if self.saved is None else self.saved.restore_game(game)
            if extra is not None:
                self.load_extra_state(extra)
            self._begin('evolution', game.step_index, game.total_steps, evolver=game)
            try:
                while not game.done:
                    losses = game.step()
                    with stopping_together():
                        self.notify('after_evolution_step', evolver=game, losses=losses)
                        self._report('evolution', game.step_index, game.total_steps, losses)
                        if game.step_index % settings.save_interval == 0 or game.done:
                            self._save_game(game)
            except BaseException:
                self.notify('interrupt_evolution', evolver=game)
                if game.step_index:
                    self._save_game(game, stopped=True)
                raise
            game.finish()
            self._end('evolution', evolver=game)

    def _set_final_ranges(self) -> None:
        own, size = (self.images.shape[-2], self.images.shape[-1]), self.final_size
        if self.recipe.calibration.image_size == 'test':
            if self.test_size.size is None:
                print_log(f'{self.test_size}: ranges stay those of images of '
                          f'{size[0]}x{size[1]}', logger='current', level=logging.WARNING)
            else:
                print_log(f'size of test images: {self.test_size}', logger='current')
        # New weights need new ranges too, unless these were learned with them.
        stale = not has_learned_ranges(self.student) and any(
            op.weight_settled for _, op in named_quant_ops(self.student))
        if size == own and not stale:
            return
        with self._phase('final_ranges'):
            total = recalibration_count(self.student, self.images, size)
            with self._batches('final_ranges', total) as progress:
                recalibrate(self.student, self.images, size, self._batch_size, progress)
        print_log(f'the last ranges are set for images of {size[0]}x{size[1]}', logger='current')

    def _reconstruct(self) -> None:
        settings = self.recipe.reconstruction
        if not settings.steps:
            return
        with self._phase('reconstruction'), reconstructor(
                self.student, self.teacher, self.images, settings, self.seed,
                self._batch_size) as blocks:
            if self.saved is not None:
                self.saved.restore_blocks(blocks)
            self._begin('reconstruction', blocks.step_index, blocks.total_steps,
                        reconstructor=blocks)
            while not blocks.done:
                losses = blocks.step()
                with stopping_together():
                    self._report('reconstruction', blocks.step_index, blocks.total_steps, losses)
                    if self.saved is not None and blocks.between_blocks:
                        self._count()
                        self.saved.save_blocks(blocks, self.seconds)
            self._end('reconstruction', reconstructor=blocks)

    def _round_weights(self) -> None:
        if not ops_to_round(self.student):
            return
        total = count_of_this_process(mosaic_count(self.images, self.final_size))
        with self._phase('rounding'), self._batches('rounding', total) as progress:
            round_weights(self.student, self.images, self._batch_size, progress)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to ``seconds[name]``, and note its peaks."""
        forget_peak()
        self._phase_name, self._counted_at = name, time.perf_counter()
        try:
            yield
        finally:
            self._count()

    def _count(self) -> None:
        """Add the time since the last call to that of the phase, and note its peaks."""
        before, self._counted_at = self._counted_at, time.perf_counter()
        self.seconds[self._phase_name] = \
            self.seconds.get(self._phase_name, 0.) + self._counted_at - before
        self._note_peaks(self._phase_name, peak_bytes())

    def _note_peaks(self, phase: str, peaks: Mapping[str, int]) -> None:
        noted = self.memory.setdefault(phase, {})
        noted.update({kind: max(value, noted.get(kind, 0)) for kind, value in peaks.items()})

    @contextmanager
    def _batches(self, phase: str, total: int) -> Iterator[Callable[[int], None]]:
        """Within the block, a function to be called with the images of each batch."""
        done = 0

        def count_up(count: int) -> None:
            nonlocal done
            done += count
            self._report(phase, done, total)

        self._begin(phase, 0, total, total=total)
        yield count_up
        self._end(phase)

    def _report(self, phase: str, done: int, total: int,
                losses: Optional[Mapping[str, float]] = None) -> None:
        progress = Progress(phase, done, total, dict(losses or {}))
        self.notify('after_progress', progress=progress)
        if self.progress is not None:
            self.progress(progress)

    def _save_images(self, images: Synthesizer, stopped: bool = False) -> None:
        if self.saved is not None:
            self._count()
            self.saved.save_images(images, self.seconds, self.extra_state())
            if stopped:
                _log_stop(images)

    def _save_game(self, game: Evolver, stopped: bool = False) -> None:
        if self.saved is None:
            return
        if not game.consistent:  # stopped within an update: the file holds an older step
            print_log('stopped within a step; resuming continues from the last saved one, if '
                      f'there is a {self.saved.path}', logger='current')
            return
        self._count()
        self.saved.save_game(game, self.seconds, self.extra_state())
        if stopped:
            _log_stop(game)


def _log_stop(phase: Union[Synthesizer, Evolver]) -> None:
    kind = 'evolution' if isinstance(phase, Evolver) else 'synthesis'
    print_log(f'stopped at step {phase.step_index} of {phase.total_steps} of the {kind}; '
              'resuming continues from here', logger='current')

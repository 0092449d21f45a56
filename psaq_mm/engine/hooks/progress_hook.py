# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Show how far a run is."""
from typing import TYPE_CHECKING, Any, Optional

from mmengine.dist import is_main_process
from tqdm import tqdm

from psaq_mm.evolution import Evolver
from psaq_mm.pipeline import Progress
from psaq_mm.registry import HOOKS
from psaq_mm.student import Reconstructor

from .psaq_hook import PSAQHook

if TYPE_CHECKING:
    from ..runner import PSAQRunner


@HOOKS.register_module()
class ProgressHook(PSAQHook):
    """A progress bar with ETA and the current losses for each phase, and scalars for
    the runner's visualizer (its local backend writes them to ``vis_data``).

    Args:
        interval (int): Steps between two records of the losses in the
            visualizer. Defaults to 10.
    """

    priority = 'BELOW_NORMAL'

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self._phase = ''
        self._bar: Optional[Any] = None

    def after_progress(self, runner: 'PSAQRunner', progress: Progress) -> None:
        if progress.losses and progress.done % self.interval == 0:
            # Student steps and sample steps of the game have losses of the same names.
            kind = progress.phase
            if kind == 'evolution':
                kind += '/sample' if 'total' in progress.losses else '/student'
            runner.visualizer.add_scalars(
                {f'{kind}/{k}': v for k, v in progress.losses.items()}, step=progress.done)
        if not is_main_process():
            return
        if self._bar is None or self._phase != progress.phase:
            self._close()
            self._phase = progress.phase
            steps = ('synthesis', 'evolution', 'reconstruction', 'held_out')
            unit = 'step' if progress.phase in steps else 'image'
            self._bar = tqdm(total=progress.total, initial=progress.done, unit=unit,
                             desc=progress.phase.replace('_', ' '), dynamic_ncols=True)
        self._bar.set_postfix({k: f'{v:.4f}' for k, v in progress.losses.items()}, refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if progress.done >= progress.total:
            self._close()

    def _close(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    interrupt_synthesis = interrupt_evolution = _close

    def after_reconstruction(self, runner: 'PSAQRunner', reconstructor: Reconstructor) -> None:
        for name, values in reconstructor.losses.items():
            runner.logger.info(f'relative error of {name} at its first and last step: '
                               f'{values[0]:.4f}, {values[-1]:.4f}')

    def after_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        self._close()  # the game may have ended early
        values = ', '.join(f'{v:.4f}' for v in evolver.losses['round/discrepancy'])
        early = ' (ended early: it rose)' if evolver.stopped else ''
        runner.logger.info(f'discrepancy as calibrated and after each round: {values}{early}')
        if not evolver.best_round:
            runner.logger.warning('no round brought the student nearer to the teacher: it stays '
                                  'as calibrated; lower evolution.weight_lr or range_lr')

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Show how far a run is."""
from typing import TYPE_CHECKING, Any, Dict, Optional

from mmengine.dist import is_main_process
from tqdm import tqdm

from psaq_mm.evolution import Evolver
from psaq_mm.registry import HOOKS
from psaq_mm.synthesis import Synthesizer

from .psaq_hook import PSAQHook

if TYPE_CHECKING:
    from ..runner import PSAQRunner


@HOOKS.register_module()
class ProgressHook(PSAQHook):
    """A progress bar with ETA and the current losses, and scalars for the
    runner's visualizer (its local backend writes them to ``vis_data``).

    Args:
        interval (int): Steps between two records of the losses in the
            visualizer. Defaults to 10.
    """

    priority = 'BELOW_NORMAL'

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self._bar: Optional[Any] = None

    def _open(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self._close()
        if not is_main_process():
            return
        self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def before_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        self._open('synthesis', synthesizer.total_steps, 'step', synthesizer.step_index)

    def after_synthesis_step(self, runner: 'PSAQRunner', synthesizer: Synthesizer,
                             losses: Dict[str, float]) -> None:
        if self._bar is not None:
            self._bar.set_postfix({k: f'{v:.3f}' for k, v in losses.items()}, refresh=False)
            self._bar.update()
        if synthesizer.step_index % self.interval == 0:
            scalars = {f'synthesis/{k}': v for k, v in losses.items()}
            runner.visualizer.add_scalars(scalars, step=synthesizer.step_index)

    def interrupt_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        self._close()

    def after_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        self._close()

    def before_calibration(self, runner: 'PSAQRunner', total: int) -> None:
        self._open('calibration', total, 'image')

    def after_calibration_batch(self, runner: 'PSAQRunner', count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def after_calibration(self, runner: 'PSAQRunner') -> None:
        self._close()

    def before_final_ranges(self, runner: 'PSAQRunner', total: int) -> None:
        self._open('final ranges', total, 'image')

    after_final_ranges_batch = after_calibration_batch

    after_final_ranges = after_calibration

    def before_rounding(self, runner: 'PSAQRunner', total: int) -> None:
        self._open('rounding', total, 'image')

    after_rounding_batch = after_calibration_batch

    after_rounding = after_calibration

    def before_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        self._shown: Dict[str, str] = {}
        self._open('evolution', evolver.total_steps, 'step', evolver.step_index)

    def after_evolution_step(self, runner: 'PSAQRunner', evolver: Evolver,
                             losses: Dict[str, float]) -> None:
        sampling = 'total' in losses
        kind = 'sample' if sampling else 'student'
        shown = ('total', 'discrepancy') if sampling else ('discrepancy', )
        self._shown.update({f'{kind} {k}': f'{losses[k]:.4f}' for k in shown if k in losses})
        if 'round' in losses:
            self._shown['round'] = f'{losses["round"]:.4f}'
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update()
        if evolver.step_index % self.interval == 0:
            scalars = {f'evolution/{kind}/{k}': v for k, v in losses.items()}
            runner.visualizer.add_scalars(scalars, step=evolver.step_index)

    def interrupt_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        self._close()

    def after_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        self._close()
        values = ', '.join(f'{v:.4f}' for v in evolver.losses['round/discrepancy'])
        early = ' (ended early: it rose)' if evolver.stopped else ''
        runner.logger.info(f'discrepancy as calibrated and after each round: {values}{early}')
        if not evolver.best_round:
            runner.logger.warning('no round brought the student nearer to the teacher: it stays '
                                  'as calibrated; lower evolution.weight_lr or range_lr')

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Save the state of a run, and continue from it."""
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict

from psaq_mm.checkpoint import load_checkpoint_file, save_torch
from psaq_mm.errors import UserError
from psaq_mm.evolution import Synthesizer
from psaq_mm.registry import HOOKS

from .psaq_hook import PSAQHook

if TYPE_CHECKING:
    from ..runner import PSAQRunner


@HOOKS.register_module()
class ResumeHook(PSAQHook):
    """Writes ``<work-dir>/state.pth`` now and then, and reads it for --resume.

    The state holds images, optimizer, random generator, step, losses and
    seconds: a resumed run ends with the same bits on the CPU. mmengine's
    CheckpointHook is not used since it writes in place and saves no
    generator.
    """

    priority = 'VERY_HIGH'  # a restored step count must reach the other hooks

    @staticmethod
    def path(runner: 'PSAQRunner') -> Path:
        """Where the state of a run is."""
        return Path(runner.work_dir) / 'state.pth'

    def before_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        if not runner.resume_run:
            return
        path = self.path(runner)
        if not path.exists():
            runner.logger.warning(f'--resume: there is no {path}; starting from the first step')
            return
        state = load_checkpoint_file(str(path))
        check_same_run(str(path), state, runner.fingerprint)
        synthesizer.load_state_dict(state['synthesizer'])
        runner.seconds.update(state['seconds'])
        runner.logger.info(f'resumed {path} at step {synthesizer.step_index} of '
                           f'{synthesizer.total_steps}')

    def after_synthesis_step(self, runner: 'PSAQRunner', synthesizer: Synthesizer,
                             losses: Dict[str, float]) -> None:
        if synthesizer.step_index % synthesizer.settings.save_interval == 0 or synthesizer.done:
            self._save(runner, synthesizer)

    def interrupt_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        if synthesizer.step_index:
            self._save(runner, synthesizer)
            runner.logger.info(f'stopped at step {synthesizer.step_index} of '
                               f'{synthesizer.total_steps}; --resume continues from here')

    def _save(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        save_torch(dict(fingerprint=runner.fingerprint, seconds=runner.seconds_so_far(),
                        synthesizer=synthesizer.state_dict()), self.path(runner))


def check_same_run(path: str, state: Any, fingerprint: Dict[str, Any]) -> None:
    """Raise unless a state belongs to a run with the same inputs.

    Raises:
        UserError: Naming what differs.
    """
    if not isinstance(state, dict) or 'fingerprint' not in state or 'synthesizer' not in state:
        raise UserError(f'{path} is not the state of a quantization run; remove it, or run '
                        'without --resume')
    saved = state['fingerprint']
    differing = [k for k in fingerprint if saved.get(k) != fingerprint[k]]
    if differing:
        raise UserError(f'--resume: {path} was written by a run with another '
                        f'{", ".join(differing)}; use the same, or run without --resume')

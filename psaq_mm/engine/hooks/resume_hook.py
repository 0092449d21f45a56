# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Save the state of a run, and continue from it."""
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional

from mmengine.dist import all_gather_object, get_rank

from psaq_mm.checkpoint import load_checkpoint_file, save_torch
from psaq_mm.errors import UserError
from psaq_mm.evolution import Evolver, Synthesizer
from psaq_mm.registry import HOOKS

from .psaq_hook import PSAQHook

if TYPE_CHECKING:
    from ..runner import PSAQRunner


@HOOKS.register_module()
class ResumeHook(PSAQHook):
    """Writes ``<work-dir>/state.pth`` now and then, and reads it for --resume.

    The state holds images, optimizers, random generators, what the student
    has learnt, steps, losses, seconds and what other hooks keep: a resumed run
    ends with the same bits on the CPU. mmengine's CheckpointHook is not used
    since it writes in place and saves no generator. Each of several processes
    has its own file.
    """

    priority = 'VERY_HIGH'  # a restored step count must reach the other hooks

    def __init__(self) -> None:
        self._synthesis: Optional[Dict[str, Any]] = None
        self._evolution: Optional[Dict[str, Any]] = None
        self._hooks: Dict[str, Any] = {}

    @staticmethod
    def path(runner: 'PSAQRunner') -> Path:
        """Where the state of a run is."""
        name = f'state_{get_rank()}.pth' if get_rank() else 'state.pth'
        return Path(runner.work_dir) / name

    def before_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        if not runner.resume_run:
            return
        path = self.path(runner)
        if not path.exists():
            runner.logger.warning(f'--resume: there is no {path}; starting from the first step')
            return
        state = load_checkpoint_file(str(path))
        self._evolution = state.get('evolver') if isinstance(state, dict) else None
        check_same_run(str(path), state, runner.fingerprint if self._evolution is None
                       else runner.evolution_fingerprint)
        synthesizer.load_state_dict(state['synthesizer'])
        self._hooks = state.get('hooks', {})
        runner.seconds.update(state['seconds'])
        runner.logger.info(f'resumed {path} at step {synthesizer.step_index} of '
                           f'{synthesizer.total_steps}')

    def after_synthesis_step(self, runner: 'PSAQRunner', synthesizer: Synthesizer,
                             losses: Dict[str, float]) -> None:
        if synthesizer.step_index % synthesizer.settings.save_interval == 0 or synthesizer.done:
            self._save_synthesis(runner, synthesizer)

    def interrupt_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        if synthesizer.step_index:
            self._save_synthesis(runner, synthesizer)
            runner.logger.info(f'stopped at step {synthesizer.step_index} of '
                               f'{synthesizer.total_steps}; --resume continues from here')

    def after_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        self._synthesis = synthesizer.state_dict()

    def before_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        if self._evolution is not None:
            evolver.load_state_dict(self._evolution)
            runner.logger.info(f'resumed the evolution at step {evolver.step_index} of '
                               f'{evolver.total_steps}')
            for name, hook in self._others(runner).items():
                if name in self._hooks:
                    hook.load_state_dict(self._hooks[name])
            self._evolution = None
        # The processes save each for itself; one that was stopped earlier, or whose file is
        # missing, would go on with another student than the rest.
        steps = all_gather_object(evolver.step_index)
        if len(set(steps)) > 1:
            raise UserError(f'{runner.work_dir}/state*.pth are of different steps of the '
                            f'evolution ({", ".join(map(str, steps))}): start again without '
                            '--resume')

    def after_evolution_step(self, runner: 'PSAQRunner', evolver: Evolver,
                             losses: Dict[str, float]) -> None:
        if evolver.step_index % evolver.settings.save_interval == 0 or evolver.done:
            self._save_evolution(runner, evolver)

    def interrupt_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        if not evolver.consistent:  # stopped within an update: the file holds an older step
            runner.logger.info('stopped within a step; --resume continues from the last '
                               f'saved one, if there is a {self.path(runner)}')
        elif evolver.step_index:
            self._save_evolution(runner, evolver)
            runner.logger.info(f'stopped at step {evolver.step_index} of {evolver.total_steps} '
                               'of the evolution; --resume continues from here')

    def _save_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        save_torch(dict(fingerprint=runner.fingerprint, seconds=runner.seconds_so_far(),
                        synthesizer=synthesizer.state_dict()), self.path(runner))

    def _save_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        save_torch(dict(fingerprint=runner.evolution_fingerprint,
                        seconds=runner.seconds_so_far(), synthesizer=self._synthesis,
                        evolver=evolver.state_dict(),
                        hooks={name: hook.state_dict() for name, hook in
                               self._others(runner).items()}), self.path(runner))

    @staticmethod
    def _others(runner: 'PSAQRunner') -> Dict[str, PSAQHook]:
        """Hooks by the names that their states are saved by."""
        return {type(hook).__name__: hook for hook in runner.hooks if isinstance(hook, PSAQHook)}


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

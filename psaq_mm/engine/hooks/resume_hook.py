# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Save the state of a run, and continue from it."""
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from mmengine.dist import all_gather_object, get_rank

from psaq_mm.checkpoint import load_checkpoint_file, save_torch
from psaq_mm.errors import UserError
from psaq_mm.evolution import Evolver
from psaq_mm.synthesis import Synthesizer
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

    priority = 'VERY_LOW'  # what is saved after a step is what all hooks made of it

    def __init__(self) -> None:
        self._synthesis: Optional[Dict[str, Any]] = None
        self._evolution: Optional[Dict[str, Any]] = None
        self._hooks: Dict[str, List[Any]] = {}

    @staticmethod
    def path(runner: 'PSAQRunner') -> Path:
        """Where the state of a run is."""
        name = f'state_{get_rank()}.pth' if get_rank() else 'state.pth'
        return Path(runner.work_dir) / name

    def restore_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        if not runner.resume_run:
            return
        path = self.path(runner)
        if not path.exists():
            runner.logger.warning(f'--resume: there is no {path}; starting from the first step')
            return
        state = load_checkpoint_file(str(path))
        check_same_run(str(path), state, runner.fingerprint)
        synthesizer.load_state_dict(state['synthesizer'])
        seconds = dict(state['seconds'])
        runner.logger.info(f'resumed {path} at step {synthesizer.step_index} of '
                           f'{synthesizer.total_steps}')
        if 'evolver' in state:
            others = differing(state, runner.evolution_fingerprint)
            if others:
                runner.logger.warning(f'{path} is of a run with another {", ".join(others)}: '
                                      'its images are used, the evolution starts again')
                seconds.pop('evolution', None)
            else:
                self._evolution, self._hooks = state['evolver'], state['hooks']
        runner.seconds.update(seconds)

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

    def restore_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        saved, self._evolution = self._evolution, None
        # The processes save each for itself; one that was stopped earlier, or whose file is
        # missing, would go on with another student than the rest.
        steps = all_gather_object(0 if saved is None else saved['step_index'])
        if len(set(steps)) > 1:
            runner.logger.warning(f'{runner.work_dir}/state*.pth are of different steps of the '
                                  f'evolution ({", ".join(map(str, steps))}): it starts again')
        elif saved is not None:
            evolver.load_state_dict(saved)
            for name, hooks in _by_name(runner).items():
                for hook, state in zip(hooks, self._hooks.get(name, [])):
                    hook.load_state_dict(state)
            runner.logger.info(f'resumed the evolution at step {evolver.step_index} of '
                               f'{evolver.total_steps}')

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
                        hooks={name: [hook.state_dict() for hook in hooks] for name, hooks in
                               _by_name(runner).items()}), self.path(runner))


def _by_name(runner: 'PSAQRunner') -> Dict[str, List[PSAQHook]]:
    """The hooks of each class, by the name that their states are saved by."""
    found: Dict[str, List[PSAQHook]] = {}
    for hook in runner.hooks:
        if isinstance(hook, PSAQHook):
            found.setdefault(type(hook).__name__, []).append(hook)
    return found


def differing(state: Dict[str, Any], fingerprint: Dict[str, Any]) -> List[str]:
    """What a run with this fingerprint has not in common with that of a state."""
    return [k for k, value in fingerprint.items() if state['fingerprint'].get(k) != value]


def check_same_run(path: str, state: Any, fingerprint: Dict[str, Any]) -> None:
    """Raise unless a state belongs to a run with the same inputs.

    Raises:
        UserError: Naming what differs.
    """
    if not isinstance(state, dict) or 'fingerprint' not in state or 'synthesizer' not in state:
        raise UserError(f'{path} is not the state of a quantization run; remove it, or run '
                        'without --resume')
    others = differing(state, fingerprint)
    if others:
        raise UserError(f'--resume: {path} was written by a run with another '
                        f'{", ".join(others)}; use the same, or run without --resume')

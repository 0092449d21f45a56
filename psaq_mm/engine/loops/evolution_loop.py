# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The phase in which images and student evolve against each other."""
from torch import nn

from psaq_mm import api
from psaq_mm.registry import LOOPS

from .phase_loop import PhaseLoop


@LOOPS.register_module()
class EvolutionLoop(PhaseLoop):
    """Steps an :class:`Evolver` until the game has ended; nothing if the config
    asks for no rounds."""

    def run(self) -> nn.Module:
        """Play the game.

        Returns:
            nn.Module: The student, ``runner.model``.

        Raises:
            FloatingPointError: If a loss is not finite; the last good state
                is saved.
        """
        runner = self.runner
        settings = runner.settings['evolution']
        if not runner.sections.evolution.rounds:
            runner.logger.info('evolution.rounds is 0: the student learns nothing; '
                               'preset=evolve lets it')
            return runner.model
        with runner.phase('evolution'), \
                api.evolver(runner.model, runner.teacher, runner.images, runner.run_seed,
                            runner.settings['synthesis'], **settings) as evolver:
            runner.call_hook('restore_evolution', evolver=evolver)
            runner.call_hook('before_evolution', evolver=evolver)
            try:
                while not evolver.done:
                    losses = evolver.step()
                    runner.call_hook('after_evolution_step', evolver=evolver, losses=losses)
            except BaseException:  # Ctrl-C too: keep what is done
                runner.call_hook('interrupt_evolution', evolver=evolver)
                raise
            evolver.finish()
            runner.call_hook('after_evolution', evolver=evolver)
        return runner.model

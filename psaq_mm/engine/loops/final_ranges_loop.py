# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The phase that sets ranges for the size of the test images."""
from torch import nn

from psaq_mm import api
from psaq_mm.synthesis import mosaic_count
from psaq_mm.registry import LOOPS

from .phase_loop import PhaseLoop


@LOOPS.register_module()
class FinalRangesLoop(PhaseLoop):
    """Sets the ranges of ``runner.model`` once more, at ``calibration.image_size``."""

    def run(self) -> nn.Module:
        """Set them.

        Returns:
            nn.Module: The student, ``runner.model``.
        """
        runner = self.runner
        evolution, size = runner.sections.evolution, runner.final_size
        trained = bool(evolution.rounds and evolution.student_steps)
        learnt = trained and evolution.learn != 'weights'
        own = (runner.images.shape[-2], runner.images.shape[-1])
        if size == own and (learnt or not trained):
            return runner.model  # the ranges are those of this size already
        with runner.phase('final_ranges'):
            total = mosaic_count(runner.images, size) + learnt * len(runner.images)
            runner.call_hook('before_final_ranges', total=total)
            api.refit(
                runner.model, runner.images, size, learnt,
                lambda count: runner.call_hook('after_final_ranges_batch', count=count),
                **runner.settings['calibration'])
            runner.call_hook('after_final_ranges')
        runner.logger.info(f'final ranges are set for images of {size[0]}x{size[1]}')
        return runner.model

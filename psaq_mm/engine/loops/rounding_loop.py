# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The phase that rounds weights which learnt nothing."""
from torch import nn

from psaq_mm import api
from psaq_mm.student import ops_left_to_nearest, ops_to_round
from psaq_mm.synthesis import mosaic_count
from psaq_mm.registry import LOOPS

from .phase_loop import PhaseLoop


@LOOPS.register_module()
class RoundingLoop(PhaseLoop):
    """Rounds weights of ``runner.model`` as ``quantization.weight.rounding`` says."""

    def run(self) -> nn.Module:
        """Round them.

        Returns:
            nn.Module: The student, ``runner.model``.
        """
        runner = self.runner
        left = ops_left_to_nearest(runner.model, runner.teacher)
        if left:
            runner.logger.info('weights that GPTQ cannot round (no product of a matrix) stay '
                               f'rounded to nearest: {", ".join(left)}')
        ops = ops_to_round(runner.model, runner.teacher)
        if not ops:
            return runner.model
        size = runner.final_size
        with runner.phase('rounding'):
            runner.call_hook('before_rounding', total=mosaic_count(runner.images, size))
            api.round_weights(
                runner.model, runner.images, size, runner.teacher,
                lambda count: runner.call_hook('after_rounding_batch', count=count),
                **runner.settings['calibration'])
            runner.call_hook('after_rounding')
        runner.logger.info(f'weights of {len(ops)} modules are rounded by GPTQ')
        return runner.model

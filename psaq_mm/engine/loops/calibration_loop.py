# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The phase that sets the student's ranges."""
import copy

from torch import nn

from psaq_mm import api
from psaq_mm.registry import LOOPS

from .phase_loop import PhaseLoop


@LOOPS.register_module()
class CalibrationLoop(PhaseLoop):
    """Makes the student, ``runner.model``, of a copy of the teacher, and sets its ranges on
    ``runner.images``."""

    def run(self) -> nn.Module:
        """Quantize and calibrate.

        Returns:
            nn.Module: The student, ``runner.model``.
        """
        runner = self.runner
        with runner.phase('calibration'):
            api.equalize(runner.teacher, runner.images, runner.sections.calibration.batch_size,
                         **runner.settings['quantization'])
            runner.model = copy.deepcopy(runner.teacher)
            api.quantize(runner.model, **runner.settings['quantization'])
            runner.call_hook('before_calibration')
            api.calibrate(
                runner.model, runner.images,
                lambda count: runner.call_hook('after_calibration_batch', count=count),
                **runner.settings['calibration'])
            runner.call_hook('after_calibration')
        return runner.model

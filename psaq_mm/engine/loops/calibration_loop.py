# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The phase that sets the student's ranges."""
from torch import nn

from psaq_mm import api
from psaq_mm.registry import LOOPS

from .phase_loop import PhaseLoop


@LOOPS.register_module()
class CalibrationLoop(PhaseLoop):
    """Quantizes ``runner.model`` and sets its ranges on ``runner.images``."""

    def run(self) -> nn.Module:
        """Quantize and calibrate.

        Returns:
            nn.Module: The student, ``runner.model``.
        """
        runner = self.runner
        with runner.phase('calibration'):
            api.quantize(runner.model, **runner.settings['quantization'])
            runner.call_hook('before_calibration')
            api.calibrate(
                runner.model, runner.images,
                lambda count: runner.call_hook('after_calibration_batch', count=count),
                **runner.settings['calibration'])
            runner.call_hook('after_calibration')
        return runner.model

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images and student, step by step. This room knows no host library."""
from .calibration import calibrate_ranges
from .measurement import measure_sqnr
from .settings import CalibrationSettings, SynthesisSettings
from .synthesis import Synthesizer, learning_rate_factor

__all__ = [
    'CalibrationSettings', 'SynthesisSettings', 'Synthesizer', 'calibrate_ranges',
    'learning_rate_factor', 'measure_sqnr'
]

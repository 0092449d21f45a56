# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images and student, step by step. This room knows no host library."""
from .calibration import calibrate_ranges
from .discrepancy import discrepancy
from .equalization import equalize_channels
from .evolution_settings import EvolutionSettings
from .evolver import Evolver
from .final_ranges import as_many_pixels, carry_ranges_over
from .measurement import measure_sqnr
from .mosaic import mosaic_count, mosaics
from .sample_step import learning_rate_factor
from .settings import CalibrationSettings, SynthesisSettings
from .student import Student
from .synthesis import Synthesizer
from .weight_rounding import ops_left_to_nearest, ops_to_round, round_by_gptq

__all__ = [
    'CalibrationSettings', 'EvolutionSettings', 'Evolver', 'Student', 'SynthesisSettings',
    'Synthesizer', 'as_many_pixels', 'calibrate_ranges', 'carry_ranges_over', 'discrepancy',
    'equalize_channels', 'learning_rate_factor', 'measure_sqnr', 'mosaic_count', 'mosaics',
    'ops_left_to_nearest', 'ops_to_round', 'round_by_gptq'
]

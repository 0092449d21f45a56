# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Phases of a quantization run, one a file."""
from .calibration_loop import CalibrationLoop
from .evolution_loop import EvolutionLoop
from .final_ranges_loop import FinalRangesLoop
from .rounding_loop import RoundingLoop
from .synthesis_loop import SynthesisLoop

__all__ = ['CalibrationLoop', 'EvolutionLoop', 'FinalRangesLoop', 'RoundingLoop',
           'SynthesisLoop']

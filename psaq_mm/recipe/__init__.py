# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What is to be done: typed settings, and the shipped ones by name."""
from .calibration import CalibrationSettings
from .evolution import EvolutionSettings
from .quantization import QuantizationSettings
from .recipe import Recipe
from .reconstruction import ReconstructionSettings
from .synthesis import SynthesisSettings

__all__ = ['CalibrationSettings', 'EvolutionSettings', 'QuantizationSettings', 'Recipe',
           'ReconstructionSettings', 'SynthesisSettings']

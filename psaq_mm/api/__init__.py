# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The verbs: what a script calls, and what the tools themselves call."""
from psaq_mm.ops import unwrap

from .calibration import calibrate, check_calibration, refit, scope_of
from .checkpoints import load, save
from .equalizing import equalize
from .evolution import check_evolution, evolve, evolver
from .quantizing import quantize
from .rounding import round_weights
from .synthesis import check_synthesis, synthesize, synthesizer

__all__ = [
    'calibrate', 'check_calibration', 'check_evolution', 'check_synthesis', 'equalize',
    'evolve', 'evolver', 'load', 'quantize', 'refit', 'round_weights', 'save', 'scope_of',
    'synthesize', 'synthesizer', 'unwrap'
]

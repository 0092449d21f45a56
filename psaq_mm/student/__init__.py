# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The quantized model: wide channels, ranges, and rounded weights."""
from .allocation import Allocation, Allocator, allocate, check_budget
from .calibration import calibrate, calibrate_ranges, scope_of
from .equalization import equalize, equalize_channels
from .final_ranges import (
    has_learned_ranges,
    recalibrate,
    recalibration_count,
    transfer_learned_ranges,
)
from .measurement import measure_each_alone, measure_sqnr, quantized_alone
from .preparation import prepare
from .reconstruction import Reconstructor, reconstruct, reconstructor
from .rounding import round_by_gptq, round_weights
from .sensitivity import TensorGroup, measure_sensitivity, measure_tap_error

__all__ = ['Allocation', 'Allocator', 'Reconstructor', 'TensorGroup', 'allocate', 'calibrate',
           'calibrate_ranges', 'check_budget', 'equalize', 'equalize_channels',
           'has_learned_ranges', 'measure_each_alone', 'measure_sensitivity', 'measure_sqnr',
           'measure_tap_error', 'prepare', 'quantized_alone', 'recalibrate',
           'recalibration_count', 'reconstruct', 'reconstructor', 'round_by_gptq',
           'round_weights', 'scope_of',
           'transfer_learned_ranges']

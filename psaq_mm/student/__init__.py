# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The quantized model: wide channels, ranges, and rounded weights."""
from .calibration import calibrate_ranges
from .equalization import equalize_channels
from .final_ranges import as_many_pixels, carry_ranges_over
from .measurement import measure_sqnr
from .rounding import ops_left_to_nearest, ops_to_round, round_by_gptq

__all__ = ['as_many_pixels', 'calibrate_ranges', 'carry_ranges_over', 'equalize_channels',
           'measure_sqnr', 'ops_left_to_nearest', 'ops_to_round', 'round_by_gptq']

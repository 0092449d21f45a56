# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Range rules, one a file, registered in OBSERVERS."""
from .mae import MAEObserver
from .min_max import MinMaxObserver
from .mse import MSEObserver
from .observer import NOTHING_OBSERVED, Observer
from .percentile import PercentileObserver

__all__ = ['NOTHING_OBSERVED', 'MAEObserver', 'MSEObserver', 'MinMaxObserver', 'Observer',
           'PercentileObserver']

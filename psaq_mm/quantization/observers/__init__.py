# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Range rules, one a file, registered in OBSERVERS."""
from .min_max import MinMaxObserver
from .mse import MSEObserver
from .observer import Observer
from .percentile import PercentileObserver

__all__ = ['MSEObserver', 'MinMaxObserver', 'Observer', 'PercentileObserver']

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One thin file per host library: where its attention, norms and inputs are."""
from .adapter import Adapter
from .hosts import find_adapter, import_hosts, matching_adapter
from .recorder import AttentionRecorder
from .tap_record import TapRecord

__all__ = ['Adapter', 'AttentionRecorder', 'TapRecord', 'find_adapter', 'import_hosts',
           'matching_adapter']

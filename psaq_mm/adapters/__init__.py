# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One thin file per host library: where its attention, norms and inputs are."""
from .adapter import Adapter, AttentionRecorder, find_adapter
from .mmcv_layers import MMCV_LINEAR
from .mmdet_swin import MMDetSwinAdapter

__all__ = ['Adapter', 'AttentionRecorder', 'MMCV_LINEAR', 'MMDetSwinAdapter', 'find_adapter']

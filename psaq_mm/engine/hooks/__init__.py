# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Hooks, one a file."""
from .backend_hook import BackendHook, describe_backend
from .bits_hook import BitsHook
from .contact_sheet_hook import ContactSheetHook
from .progress_hook import ProgressHook
from .psaq_hook import PSAQHook
from .quantized_checkpoint_hook import QuantizedCheckpointHook
from .report_hook import ReportHook

__all__ = [
    'BackendHook', 'BitsHook', 'ContactSheetHook', 'PSAQHook', 'ProgressHook',
    'QuantizedCheckpointHook', 'ReportHook', 'describe_backend'
]

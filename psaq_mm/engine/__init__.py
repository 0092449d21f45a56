# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What mmengine sees: configs, runner, loops, hooks, and the tools' shell."""
from .config import Sections, custom_hooks, load_config, read_sections
from .hooks import PSAQHook
from .model import build_float_model, build_model, init_model, resolve_device
from .runner import PSAQRunner

__all__ = [
    'PSAQHook', 'PSAQRunner', 'Sections', 'build_float_model', 'build_model',
    'custom_hooks', 'init_model', 'load_config', 'read_sections', 'resolve_device'
]

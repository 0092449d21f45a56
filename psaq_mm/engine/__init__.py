# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What mmengine sees: configs, runner, hooks, and the tools' shell."""
from .checkpoint_model import inferencer_config
from .config import custom_hooks, has_recipe, load_config, read_recipe
from .hooks import PSAQHook
from .model import build_float_model, build_model, init_model, resolve_device
from .own_images import load_images
from .runner import PSAQRunner

__all__ = [
    'PSAQHook', 'PSAQRunner', 'build_float_model', 'build_model', 'custom_hooks', 'has_recipe',
    'inferencer_config', 'init_model', 'load_config', 'load_images', 'read_recipe',
    'resolve_device'
]

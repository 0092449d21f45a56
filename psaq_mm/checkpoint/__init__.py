# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Files: what is written, and how it is read without running its code."""
from .atomic import atomic_write, ensure_writable_dir, save_bytes, save_json, save_torch
from .files import load, save
from .float_checkpoint import (
    fit_float_state,
    load_float_state,
    load_float_weights,
    with_own_tables,
)
from .manifest import MANIFEST_KEY, STATE_KEY, build_manifest, is_quantized, read_manifest
from .matching import first_differences, require_match
from .plain import plain
from .planned_size import planned_bytes
from .quantized_checkpoint import (
    guarded,
    load_quantized_state,
    prepare_for_loading,
    quantized_checkpoint,
    size_of_quantized,
)
from .safe_load import (
    extract_state_dict,
    load_checkpoint_file,
    meta_of,
    require_finite,
    sha256_of_file,
)
from .weights import WeightChoice, find_weights

__all__ = [
    'MANIFEST_KEY', 'STATE_KEY', 'WeightChoice', 'atomic_write', 'build_manifest',
    'ensure_writable_dir', 'extract_state_dict', 'find_weights', 'first_differences',
    'fit_float_state', 'guarded', 'is_quantized', 'load', 'load_checkpoint_file',
    'load_float_state', 'load_float_weights', 'load_quantized_state', 'meta_of', 'plain',
    'planned_bytes', 'prepare_for_loading', 'quantized_checkpoint', 'read_manifest',
    'require_finite', 'require_match', 'save', 'save_bytes', 'save_json', 'save_torch',
    'sha256_of_file', 'size_of_quantized', 'with_own_tables'
]

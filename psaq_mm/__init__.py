# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize Swin models of OpenMMLab without any data.

    recipe = psaq_mm.Recipe.shipped('w4a4')
    student = psaq_mm.quantize(model, recipe)   # from the float model alone
    psaq_mm.save(student, 'quantized.pth')
    psaq_mm.load(float_model, 'quantized.pth')

The steps of :func:`quantize`, for those who compose them: :func:`synthesize`,
:func:`equalize`, :func:`allocate` (mixed precision), :func:`prepare`, :func:`calibrate`,
:func:`evolve`, :func:`recalibrate`, :func:`reconstruct`, :func:`round_weights`, in this order.
"""
import importlib
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint import load, save
    from .engine import inferencer_config, init_model, load_images
    from .evolution import evolve
    from .ops import unwrap
    from .pipeline import Progress, quantize
    from .recipe import (
        CalibrationSettings,
        EvolutionSettings,
        QuantizationSettings,
        Recipe,
        ReconstructionSettings,
        SynthesisSettings,
    )
    from .student import (
        allocate,
        calibrate,
        equalize,
        prepare,
        recalibrate,
        reconstruct,
        round_weights,
    )
    from .synthesis import synthesize

__all__ = [
    'CalibrationSettings', 'EvolutionSettings', 'Progress', 'QuantizationSettings', 'Recipe',
    'ReconstructionSettings', 'SynthesisSettings', 'UserError', '__version__', 'allocate',
    'calibrate', 'equalize', 'evolve', 'inferencer_config', 'init_model', 'load', 'load_images',
    'prepare', 'quantize', 'recalibrate', 'reconstruct', 'round_weights', 'save', 'synthesize',
    'unwrap'
]

_MODULES = dict(
    CalibrationSettings='recipe', EvolutionSettings='recipe', Progress='pipeline',
    QuantizationSettings='recipe', Recipe='recipe', ReconstructionSettings='recipe',
    SynthesisSettings='recipe', allocate='student', calibrate='student', equalize='student',
    evolve='evolution',
    inferencer_config='engine', init_model='engine', load='checkpoint', load_images='engine',
    prepare='student', quantize='pipeline', recalibrate='student', reconstruct='student',
    round_weights='student', save='checkpoint', synthesize='synthesis', unwrap='ops')
"""Name to the module that it is imported from."""

_SUBMODULES = ('adapters', 'checkpoint', 'classification', 'deploy', 'engine', 'evolution', 'ops',
               'pipeline', 'prior', 'quantization', 'recipe', 'registry', 'report', 'runtime',
               'student', 'synthesis')
"""What is there after ``import psaq_mm`` alone."""


def __getattr__(name: str) -> Any:
    """Import what is asked for: ``psaq_mm.runtime`` works without torch."""
    if name in _SUBMODULES:
        return importlib.import_module(f'.{name}', __name__)
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    found = getattr(importlib.import_module(f'.{_MODULES[name]}', __name__), name)
    globals()[name] = found
    return found


def __dir__() -> Any:
    return sorted({*globals(), *__all__})

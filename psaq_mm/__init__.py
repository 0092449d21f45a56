# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize Swin models of OpenMMLab without any data.

    recipe = psaq_mm.Recipe.shipped('w4a4')
    student = psaq_mm.quantize(model, recipe)   # from the float model alone
    psaq_mm.save(student, 'quantized.pth')
    psaq_mm.load(float_model, 'quantized.pth')

The steps of :func:`quantize`, for those who compose them: :func:`synthesize`,
:func:`equalize`, :func:`prepare`, :func:`calibrate`, :func:`reconstruct`, :func:`evolve`,
:func:`recalibrate`, :func:`round_weights`. ``psaq_mm/pipeline.py`` has them in order.
"""
from typing import TYPE_CHECKING, Any

from .checkpoint import load, save
from .errors import UserError
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
from .student import calibrate, equalize, prepare, recalibrate, reconstruct, round_weights
from .synthesis import synthesize
from .version import __version__

if TYPE_CHECKING:
    from .engine import inferencer_config, init_model, load_images

__all__ = [
    'CalibrationSettings', 'EvolutionSettings', 'Progress', 'QuantizationSettings', 'Recipe',
    'ReconstructionSettings', 'SynthesisSettings', 'UserError', '__version__', 'calibrate',
    'equalize', 'evolve', 'inferencer_config', 'init_model', 'load', 'load_images', 'prepare',
    'quantize', 'recalibrate', 'reconstruct', 'round_weights', 'save', 'synthesize', 'unwrap'
]


def __getattr__(name: str) -> Any:
    """What imports the runner, when it is asked for: the rest does not need it."""
    if name in ('inferencer_config', 'init_model', 'load_images'):
        from . import engine
        return getattr(engine, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

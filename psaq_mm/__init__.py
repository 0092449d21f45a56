# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize Swin models of OpenMMLab without any data.

    settings = psaq_mm.shipped('w4a4')          # those of our configs
    images = psaq_mm.synthesize(model, **settings['synthesis'])  # from the float model alone
    psaq_mm.equalize(model, images, **settings['quantization'])  # computes what it did
    student = copy.deepcopy(model)
    psaq_mm.quantize(student, **settings['quantization'])
    psaq_mm.calibrate(student, images)
    psaq_mm.refit(student, images, (800, 1344))  # ranges at test size
    psaq_mm.round_weights(student, images, (800, 1344))  # by GPTQ
    psaq_mm.save(student, 'quantized.pth')
    psaq_mm.load(float_model, 'quantized.pth')
"""
from typing import TYPE_CHECKING, Any

from .api import (
    calibrate,
    equalize,
    evolve,
    load,
    quantize,
    refit,
    round_weights,
    save,
    synthesize,
    unwrap,
)
from .errors import UserError
from .presets import shipped
from .version import __version__

if TYPE_CHECKING:
    from .engine import init_model

__all__ = [
    'UserError', '__version__', 'calibrate', 'equalize', 'evolve', 'init_model',
    'load', 'quantize', 'refit',
    'round_weights', 'save', 'shipped', 'synthesize', 'unwrap'
]


def __getattr__(name: str) -> Any:
    """``init_model`` when it is asked for: it imports the runner, which the rest needs not."""
    if name == 'init_model':
        from .engine import init_model
        return init_model
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

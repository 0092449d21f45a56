# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize Swin models of OpenMMLab without any data.

    images = psaq_mm.synthesize(model)          # from the float model alone
    psaq_mm.quantize(model, weight=dict(bits=4))
    psaq_mm.calibrate(model, images)
    psaq_mm.save(model, 'quantized.pth')
    psaq_mm.load(float_model, 'quantized.pth')
"""
from .api import calibrate, load, quantize, save, synthesize, unwrap
from .errors import UserError
from .version import __version__

__all__ = [
    'UserError', '__version__', 'calibrate', 'load', 'quantize', 'save', 'synthesize', 'unwrap'
]

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize Swin models of OpenMMLab without any data.

    images = psaq_mm.synthesize(model)          # from the float model alone
    student = copy.deepcopy(model)
    psaq_mm.quantize(student, weight=dict(bits=4))
    psaq_mm.calibrate(student, images)
    psaq_mm.evolve(student, model, images, rounds=10)
    psaq_mm.save(student, 'quantized.pth')
    psaq_mm.load(float_model, 'quantized.pth')
"""
from .api import calibrate, evolve, load, quantize, save, synthesize, unwrap
from .errors import UserError
from .version import __version__

__all__ = [
    'UserError', '__version__', 'calibrate', 'evolve', 'load', 'quantize', 'save', 'synthesize',
    'unwrap'
]

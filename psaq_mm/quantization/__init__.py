# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Numbers to integers and back. Pure torch: nothing here knows a model."""
from .channel_width import excess_width
from .fake_quantize import dequantize, fake_quantize, quantize_to_integers
from .gptq import gptq_round, second_moments
from .observers import MAEObserver, MinMaxObserver, MSEObserver, Observer, PercentileObserver
from .packing import pack_integers, unpack_integers
from .quantizer import Quantizer
from .ranges import scale_and_zero_point
from .rotation import Rotation
from .spec import QuantSpec
from .sqnr import sqnr_db
from .token_sizes import token_sizes

__all__ = [
    'MAEObserver', 'MSEObserver', 'MinMaxObserver', 'Observer', 'PercentileObserver', 'QuantSpec',
    'Quantizer', 'Rotation', 'dequantize', 'excess_width', 'fake_quantize', 'gptq_round',
    'pack_integers', 'quantize_to_integers', 'scale_and_zero_point', 'second_moments', 'sqnr_db',
    'token_sizes', 'unpack_integers'
]

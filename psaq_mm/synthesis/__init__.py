# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images from a float model alone."""
from .from_model import check_synthesis, sized_for, synthesize, synthesizer
from .mosaic import mosaic_count, mosaics
from .sample_step import learning_rate_factor
from .synthesizer import Synthesizer, share_of

__all__ = ['Synthesizer', 'check_synthesis', 'learning_rate_factor', 'mosaic_count', 'mosaics',
           'share_of', 'sized_for', 'synthesize', 'synthesizer']

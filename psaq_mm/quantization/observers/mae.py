# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A range rule that weighs clipping against rounding, for distributions."""
from psaq_mm.registry import OBSERVERS

from .mse import MSEObserver


@OBSERVERS.register_module()
class MAEObserver(MSEObserver):
    """The shrunken min-max range with the smallest mean absolute error [choice].

    For softmax outputs in a few bits. Of a row of attention the absolute error
    bounds that of ``attn @ v``, whether it is the error of one large weight or
    of many small ones. The squared error looks at the large ones alone: its range
    may round to 0 all of a window that attends evenly, as those of a plain
    background do. Arguments are those of :class:`MSEObserver`.
    """

    power = 1

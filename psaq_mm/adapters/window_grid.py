# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How stages cut an image into attention windows."""
from typing import Iterable, Iterator, Tuple

import numpy as np

WindowGrid = Tuple[Tuple[int, int], Tuple[int, int]]
"""How many rows and columns a stage merges into one, and the height and width of its
windows."""


def real_tokens(stages: Iterable[WindowGrid], size: Tuple[int, int]) -> Iterator[float]:
    """The share of tokens in the windows of each stage that are no padding, above 0 to 1.

    Args:
        stages (Iterable[WindowGrid]): Of :meth:`Adapter.attention_windows`.
        size (tuple[int, int]): Height and width of the images.
    """
    height, width = size
    for step, window in stages:
        height, width = -(-height // step[0]), -(-width // step[1])
        padded = (height + -height % window[0]) * (width + -width % window[1])
        yield height * width / padded


def window_period(stages: Iterable[WindowGrid]) -> Tuple[int, int]:
    """Height and width, in pixels, whose multiples fill the windows of all stages.

    Args:
        stages (Iterable[WindowGrid]): Of :meth:`Adapter.attention_windows`.
    """
    periods = [(1, 1)]
    stride = (1, 1)
    for step, window in stages:
        stride = (stride[0] * step[0], stride[1] * step[1])
        periods.append((stride[0] * window[0], stride[1] * window[1]))
    height, width = (int(np.lcm.reduce(sides)) for sides in zip(*periods))
    return height, width

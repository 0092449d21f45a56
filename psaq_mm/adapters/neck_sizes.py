# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Sizes of images at which neck and dense head of a detector or segmentor can be run."""
from typing import Any, Dict, Optional, Sequence, Tuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from psaq_mm.devices import module_device
from psaq_mm.modes import evaluating

from .window_grid import WindowGrid

Size = Tuple[int, int]

_PARTS: 'WeakKeyDictionary[nn.Module, Dict[Size, int]]' = WeakKeyDictionary()


def first_taken(model: nn.Module, head: Optional[nn.Module], stages: Sequence[WindowGrid],
                sizes: Sequence[Size]) -> Optional[Size]:
    """The first size at which neck and head can be run; as far as they can at any of them.

    Args:
        model (nn.Module): The float model, with a ``backbone`` and perhaps a ``neck``.
        head (nn.Module, optional): What reads the neck's feature maps.
        stages (Sequence[WindowGrid]): Of :meth:`Adapter.attention_windows`.
        sizes (Sequence[tuple[int, int]]): Heights and widths in pixels.
    """
    best: Tuple[int, Optional[Size]] = (-1, None)
    for size in sizes:
        parts = parts_that_run(model, head, stages, size)
        if parts > best[0]:
            best = parts, size
        if parts == 2:
            break
    return best[1]


def parts_that_run(model: Any, head: Optional[nn.Module], stages: Sequence[WindowGrid],
                   size: Size) -> int:
    """How many of neck and head can be run on feature maps of images of a size; the answer is
    kept for the model. Arguments are those of :func:`first_taken`."""
    neck = getattr(model, 'neck', None)
    if neck is None:
        return 2
    known = _PARTS.setdefault(model, {})
    if size not in known:
        backbone, (height, width) = model.backbone, size
        maps: Any = []
        for i, (step, _) in enumerate(stages):
            height, width = -(-height // step[0]), -(-width // step[1])
            if i in backbone.out_indices:
                maps.append(torch.zeros(1, backbone.num_features[i], height, width,
                                        device=module_device(model)))
        parts = 0
        try:
            with evaluating(model), torch.no_grad():
                maps = neck(maps)
                parts = 1
                if head is not None:
                    head(maps)
                parts = 2
        except (torch.cuda.OutOfMemoryError, MemoryError):  # says nothing of the size
            raise
        except Exception:  # necks and heads are anyone's code
            pass
        known[size] = parts
    return known[size]

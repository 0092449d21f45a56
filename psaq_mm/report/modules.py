# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Where a quantized module stands in a model, and what it does there."""
import re
from typing import Any, List, Mapping, Sequence, Tuple

KINDS = ('attention', 'attention: linear', 'MLP: linear', 'linear', 'convolution', 'other')
"""What modules are told apart by in pictures."""


def kind_of(entry: Mapping[str, Any]) -> str:
    """One of :data:`KINDS`, by the name and the op of a module of ``report.json``."""
    name, op = entry['name'], entry['op']
    if 'Conv' in op:
        return 'convolution'
    if 'Linear' not in op:
        return 'attention' if re.search('Attention|MSA', op) else 'other'
    if re.search(r'\battn\b', name):
        return 'attention: linear'
    return 'MLP: linear' if re.search(r'\b(ffn|mlp)\b', name) else 'linear'


def part_of(name: str) -> str:
    """The part of a model that a module is in, such as ``stage 2``, ``neck`` or ``RoI head``."""
    stage = re.search(r'\b(?:stages|layers)\.(\d+)\.(?:blocks|downsample)', name)
    if stage:
        return f'stage {int(stage[1]) + 1}'
    if re.search(r'\bblocks\.\d+', name):
        return 'blocks'
    if 'patch_embed' in name:
        return ''
    first = re.sub(r'^(?:backbone|model)\.', '', name).split('.')[0]
    return first.replace('roi_head', 'RoI head').replace('rpn_', 'RPN ').replace('_', ' ')


def spans(parts: Sequence[str]) -> List[Tuple[str, int, int]]:
    """Each run of equal parts: what they are, the first of them and the last."""
    found: List[Tuple[str, int, int]] = []
    for i, part in enumerate(parts):
        if found and found[-1][0] == part:
            found[-1] = (part, found[-1][1], i)
        else:
            found.append((part, i, i))
    return found

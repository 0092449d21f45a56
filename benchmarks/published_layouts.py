# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Weights in the layouts that they were published in, made from models of today.

Written from the layouts' documented names and formulas, the other way round
than the converter. The dry run of all configs and the tests make checkpoints
with it.
"""
from typing import Dict, Mapping

import torch
from torch import Tensor


def to_swin_authors_detection(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The keys of Swin-Transformer-Object-Detection and -Semantic-Segmentation.

    Args:
        state (Mapping[str, Tensor]): Of an mmdet or mmseg model, keys with
            ``backbone.``.
    """
    published = {}
    for key, value in state.items():
        if key.startswith('backbone.'):
            if '.downsample.' in key:
                value = concatenated(value)
            for old, new in (('patch_embed.projection', 'patch_embed.proj'),
                             ('stages.', 'layers.'), ('attn.w_msa.', 'attn.'),
                             ('ffn.layers.0.0.', 'mlp.fc1.'), ('ffn.layers.1.', 'mlp.fc2.')):
                key = key.replace(old, new)
        published[key] = value
    return published


def concatenated(value: Tensor) -> Tensor:
    """Input channels of a patch merging, from unfolded to concatenated.

    Swin's own code concatenates x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2]
    and x[1::2, 1::2] (rows, columns); torch's Unfold puts the 2x2 kernel, row
    by row, inside of each channel.
    """
    channels = value.shape[-1] // 4
    parts = []
    for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
        parts.append(value[..., [c * 4 + row * 2 + column for c in range(channels)]])
    return torch.cat(parts, -1)


def to_swin_authors_classification(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The keys of the Swin-Transformer repository's classifiers.

    Patch mergings stand at the end of a stage (timm has them at the beginning
    of the next one), the classifier is ``head``, and index tables are saved.

    Args:
        state (Mapping[str, Tensor]): Of a timm Swin Transformer.
    """
    published = {}
    for key, value in state.items():
        if '.downsample.' in key:
            stage = int(key.split('.')[1])
            key = key.replace(f'layers.{stage}.', f'layers.{stage - 1}.', 1)
        published[key.replace('head.fc.', 'head.')] = value
        if key.endswith('.attn.relative_position_bias_table'):
            index = key.replace('bias_table', 'index')
            published[index] = torch.zeros(49, 49, dtype=torch.long)
    return published

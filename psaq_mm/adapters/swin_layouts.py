# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The keys and channel orders that Swin detectors and segmentors were published in.

======================  =====================================================
layout                  where it comes from
======================  =====================================================
OpenMMLab               mmdet 2.16 and later, mmseg 0.20 and later, their
                        model zoos: ``backbone.stages.0.blocks.0.attn.w_msa``
Swin authors            Swin-Transformer-Object-Detection and
                        Swin-Transformer-Semantic-Segmentation (mmdet 2 and
                        mmseg 0 keys): ``backbone.layers.0.blocks.0.attn``
======================  =====================================================

Necks and heads have the same keys in both.
"""
import re
from typing import Dict, Mapping, Tuple

from torch import Tensor

OPENMMLAB = 'OpenMMLab (mmdet 2.16+, mmseg 0.20+)'
SWIN_AUTHORS = 'Swin authors (mmdet 2 and mmseg 0 keys)'

_RENAMES = (
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'^layers\.(\d+)\.blocks\.(\d+)\.attn\.', r'stages.\1.blocks.\2.attn.w_msa.'),
    (r'^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.', r'stages.\1.blocks.\2.ffn.layers.0.0.'),
    (r'^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.', r'stages.\1.blocks.\2.ffn.layers.1.'),
    (r'^layers\.', 'stages.'),
)


def reorder_patch_merging(value: Tensor) -> Tensor:
    """Bring the input channels of a patch merging into OpenMMLab's order.

    The Swin authors concatenate the four neighbours of a 2x2 patch, upper
    left, lower left, upper right, lower right, each with its C channels:
    channel (column * 2 + row) * C + c. OpenMMLab unfolds:
    channel c * 4 + row * 2 + column.

    Args:
        value (Tensor): Weight of the reduction, shape (out, 4C), or weight or
            bias of the norm before it, shape (4C, ).

    Returns:
        Tensor: The same values, reordered; the same shape.
    """
    *lead, channels = value.shape
    patches = value.reshape(-1, 2, 2, channels // 4)  # (out, column, row, C)
    return patches.permute(0, 3, 2, 1).reshape(*lead, channels).contiguous()


def from_swin_authors(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Convert the weights of a backbone from the Swin authors' layout.

    Args:
        state (Mapping[str, Tensor]): Keys without the model's ``backbone.``.

    Returns:
        dict[str, Tensor]: In OpenMMLab's layout. Attention masks are left
        out: the model computes them.
    """
    converted = {}
    for key, value in state.items():
        if key.endswith('.attn_mask'):
            continue
        if '.downsample.' in key and value.dim() > 0 and value.shape[-1] % 4 == 0:
            value = reorder_patch_merging(value)
        for pattern, replacement in _RENAMES:
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        converted[key] = value
    return converted


def convert_openmmlab_swin(state: Mapping[str, Tensor],
                           backbone: str) -> Tuple[Dict[str, Tensor], str]:
    """Bring published weights into the layout of mmdet and mmseg.

    Args:
        state (Mapping[str, Tensor]): Weights by name.
        backbone (str): Name of the backbone within the model; empty if the
            model is the backbone.

    Returns:
        tuple: The weights, and the name of the layout they came in;
        unchanged and an empty name if it is not recognised.
    """
    prefix = backbone + '.' if backbone else ''
    if any(key.startswith(prefix + 'stages.') for key in state):
        return dict(state), OPENMMLAB
    if not any(key.startswith(prefix + 'layers.') for key in state):
        return dict(state), ''
    inside = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    outside = {k: v for k, v in state.items() if not k.startswith(prefix)}
    converted = {prefix + k: v for k, v in from_swin_authors(inside).items()}
    return {**converted, **outside}, SWIN_AUTHORS

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The Swin Transformer of mmdet and mmseg, in a form that can be traced."""
from typing import Any, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.errors import UserError

from ..exportable_ops import is_rotated, linear_of_patches, quantize
from ..exportable_swin import ExportableBlock, ExportableMerging, ExportableStage, ExportableSwin
from ..subgraph import Size
from ..window_order import Window, padded

NEIGHBOURS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""The order in which nn.Unfold concatenates patches."""

class OpenMMLabBlock(ExportableBlock):
    """A SwinBlock, or its quantized op."""

    def __init__(self, block: Any) -> None:
        attention = block.attn.w_msa
        side, shift = block.attn.window_size, block.attn.shift_size
        tokens = side * side
        bias = attention.relative_position_bias_table[attention.relative_position_index.view(-1)]
        super().__init__(block, attention, bias.view(tokens, tokens, -1).permute(2, 0, 1),
                         (side, side), (shift, shift))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.host.ffn(self.host.norm2(x), identity=x)


class ExportablePatchEmbed(nn.Module):
    """The patch embedding, on images of one size or of any.

    Patches become rows and the convolution a linear layer, in which engines
    find the integers.

    Args:
        backbone (nn.Module): The host's Swin Transformer.
        size (tuple[int, int], optional): Height and width of the images; None
            if they vary.
    """

    def __init__(self, backbone: Any, size: Optional[Size]) -> None:
        super().__init__()
        self.host, self.size = backbone.patch_embed, size
        projection = self.host.projection
        self.patch = tuple(projection.kernel_size)
        if tuple(projection.stride) != self.patch or any(projection.padding):
            raise UserError('backbone.patch_embed: patches that overlap cannot be exported')
        self.project = linear_of_patches(projection)
        self.position = backbone.absolute_pos_embed if backbone.use_abs_pos_embed else None

    def forward(self, images: Tensor) -> Tuple[Tensor, Tuple[Any, Any]]:
        """Args:
            images (Tensor): Shape (B, C, H, W).

        Returns:
            tuple: Tokens of shape (B, h*w, C), and (h, w).
        """
        height, width = self.size or (images.shape[2], images.shape[3])
        down = padded(height, self.patch[0]) - height
        right = padded(width, self.patch[1]) - width
        if self.size is None or down or right:
            images = F.pad(images, [0, right, 0, down])
        (rows, cols), channels = self.patch, images.shape[1]
        size = images.shape[2] // rows, images.shape[3] // cols
        # Quantized again behind the reordering: see ExportableAttention.
        x = quantize(self.project, 'input', images)
        x = x.reshape(-1, channels, size[0], rows, size[1], cols).permute(0, 2, 4, 1, 3, 5)
        x = self.project(x.reshape(-1, size[0] * size[1], channels * rows * cols))
        if self.host.norm is not None:
            x = self.host.norm(x)
        x = quantize(self.host, 'output', x)
        return x if self.position is None else x + self.position, size


def exportable_merging(downsample: Any) -> ExportableMerging:
    """Make patch merging exportable; its weights are permuted in place.

    nn.Unfold concatenates the four patches of each channel, a gather the
    channels of each patch.
    """
    sampler = downsample.sampler
    if tuple(sampler.kernel_size) != (2, 2) or tuple(sampler.stride) != (2, 2):
        raise UserError('backbone: patch merging other than of 2x2 patches cannot be exported')
    norm, reduction = downsample.norm, downsample.reduction
    order = torch.arange(reduction.in_features).view(-1, 4).t().reshape(-1)
    with torch.no_grad():
        for values in (norm.weight, norm.bias) if norm is not None else ():
            values.copy_(values[order])
        if is_rotated(reduction):
            # What is rotated has another order of its own.
            return ExportableMerging(norm, reduction, NEIGHBOURS, order.argsort())
        reduction.weight.copy_(reduction.weight[:, order])
    return ExportableMerging(norm, reduction, NEIGHBOURS)


def exportable_swin(backbone: Any, size: Optional[Size], batch: int) -> ExportableSwin:
    """Make a Swin Transformer exportable; its weights are changed in place."""
    stages: List[ExportableStage] = []
    merge: Optional[ExportableMerging] = None
    for index, stage in enumerate(backbone.stages):
        norm = getattr(backbone, f'norm{index}') if index in backbone.out_indices else None
        stages.append(ExportableStage(merge, [OpenMMLabBlock(block) for block in stage.blocks],
                                      norm))
        merge = exportable_merging(stage.downsample) if stage.downsample is not None else None
    embed = ExportablePatchEmbed(backbone, size)
    tokens: Optional[Window] = None
    if size is not None:
        tokens = tuple(padded(n, p) // p for n, p in zip(size, embed.patch))
    return ExportableSwin(embed, stages, roll_first=False, size=tokens, batch=batch)

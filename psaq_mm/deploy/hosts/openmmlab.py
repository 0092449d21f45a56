# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Detectors of mmdet and segmentors of mmseg with a Swin backbone.

Of a detector, backbone and neck become the graph; of a segmentor, the decode
head too. What comes after (proposals, RoIAlign, NMS, resizing) stays the host's.
"""
import copy
from typing import Any, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp

from ..adaptive_pool import use_pool_forms
from ..graph_part import GraphPart, Run, Size, StandIn
from ..swin import AttentionForm, BlockForm, MergeForm, StageForm, SwinForm
from ..window_order import Window, padded

NEIGHBOURS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Patches that nn.Unfold puts side by side."""


class OpenMMLabBlock(BlockForm):
    """A SwinBlock, or its quantized op."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.host = block
        attention = block.attn.w_msa
        side, shift = block.attn.window_size, block.attn.shift_size
        self.window, self.shift = (side, side), (shift, shift)
        tokens = side * side
        table = attention.relative_position_bias_table
        bias = table[attention.relative_position_index.view(-1)]
        self.attention = AttentionForm(
            attention, bias.view(tokens, tokens, -1).permute(2, 0, 1), self.window, self.shift)

    def normalize(self, x: Tensor) -> Tensor:
        return self.host.norm1(x)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self._quantize('attention_residual', x + attended)
        return self._quantize('ffn_residual', self.host.ffn(self.host.norm2(x), identity=x))

    def _quantize(self, role: str, x: Tensor) -> Tensor:
        return self.host.quantize(role, x) if isinstance(self.host, QuantOp) else x


class PatchEmbedForm(nn.Module):
    """The patch embedding, with sizes that may vary."""

    def __init__(self, backbone: Any, fixed: Optional[Size]) -> None:
        super().__init__()
        self.host, self.fixed = backbone.patch_embed, fixed
        projection = self.host.projection
        self.patch = tuple(projection.kernel_size)
        if tuple(projection.stride) != self.patch or any(projection.padding):
            raise UserError('backbone.patch_embed: patches that overlap cannot be exported')
        position = getattr(backbone, 'absolute_pos_embed', None)
        self.position = position if backbone.use_abs_pos_embed else None

    def forward(self, images: Tensor) -> Tuple[Tensor, Tuple[Any, Any]]:
        """Args:
            images (Tensor): Shape (B, C, H, W).

        Returns:
            tuple: Tokens of shape (B, h*w, C), and (h, w).
        """
        height, width = self.fixed or (images.shape[2], images.shape[3])
        down = padded(height, self.patch[0]) - height
        right = padded(width, self.patch[1]) - width
        if self.fixed is None or down or right:
            images = F.pad(images, [0, right, 0, down])
        x = self.host.projection(images)
        size = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        if self.host.norm is not None:
            x = self.host.norm(x)
        if isinstance(self.host, QuantOp):
            x = self.host.quantize('output', x)
        return x if self.position is None else x + self.position, size


def merge_form(downsample: Any) -> MergeForm:
    """Patch merging with channels in the order of a gather: nn.Unfold puts the
    four patches of a channel side by side, a gather the channels of a patch."""
    sampler = downsample.sampler
    if tuple(sampler.kernel_size) != (2, 2) or tuple(sampler.stride) != (2, 2):
        raise UserError('backbone: patch merging other than of 2x2 patches cannot be exported')
    norm, reduction = downsample.norm, downsample.reduction
    order = torch.arange(reduction.in_features).view(-1, 4).t().reshape(-1)
    with torch.no_grad():
        for values in (norm.weight, norm.bias) if norm is not None else ():
            values.copy_(values[order])
        reduction.weight.copy_(reduction.weight[:, order])
    return MergeForm(norm, reduction, NEIGHBOURS)


def swin_form(backbone: Any, size: Optional[Size], batch: int) -> SwinForm:
    """A Swin Transformer of mmdet or mmseg; it is changed in the making."""
    stages: List[StageForm] = []
    merge: Optional[MergeForm] = None
    for index, stage in enumerate(backbone.stages):
        norm = getattr(backbone, f'norm{index}') if index in backbone.out_indices else None
        stages.append(StageForm(merge, [OpenMMLabBlock(block) for block in stage.blocks], norm))
        merge = merge_form(stage.downsample) if stage.downsample is not None else None
    embed = PatchEmbedForm(backbone, size)
    tokens: Optional[Window] = None
    if size is not None:
        tokens = tuple(padded(n, p) // p for n, p in zip(size, embed.patch))
    return SwinForm(embed, stages, roll_first=False, size=tokens, batch=batch)


class OpenMMLabForm(nn.Module):
    """Backbone, neck and, of a segmentor, decode head."""

    def __init__(self, backbone: nn.Module, neck: Optional[nn.Module],
                 head: Optional[nn.Module]) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        features: Any = []
        for tokens, height, width in self.backbone(images):
            channels = tokens.shape[-1]
            features.append(tokens.reshape(-1, height, width, channels).permute(0, 3, 1, 2))
        if self.neck is not None:
            features = self.neck(tuple(features))
        if self.head is not None:
            return (self.head.forward(features), )
        return tuple(features)


class OpenMMLabPart(GraphPart):
    """Backbone and neck, and the decode head of a segmentor."""

    @property
    def _bare(self) -> bool:
        return not hasattr(self.model, 'backbone')

    @property
    def _backbone(self) -> Any:
        return self.model if self._bare else self.model.backbone

    @property
    def _neck(self) -> Any:
        return None if self._bare else getattr(self.model, 'neck', None)

    @property
    def _head(self) -> Any:
        head = None if self._bare else getattr(self.model, 'decode_head', None)
        return None if isinstance(head, nn.ModuleList) else head

    @property
    def name(self) -> str:
        if self._bare:
            return 'backbone'
        return ' + '.join(['backbone', *(['neck'] if self._neck is not None else []),
                           *(['decode_head'] if self._head is not None else [])])

    @property
    def output_names(self) -> Tuple[str, ...]:
        if self._head is not None:
            return ('logits', )
        count = len(self._backbone.out_indices)
        if self._neck is not None:
            count = getattr(self._neck, 'num_outs', count)
        return tuple(f'feature_{index}' for index in range(count))

    @property
    def channels(self) -> int:
        return int(self._backbone.patch_embed.projection.in_channels)

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        features = self._backbone(images)
        if self._neck is not None:
            features = self._neck(features)
        return (self._head.forward(features), ) if self._head is not None else tuple(features)

    def export_form(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        backbone, neck, head = copy.deepcopy((self._backbone, self._neck, self._head))
        form = OpenMMLabForm(swin_form(backbone, size, batch), neck, head)
        use_pool_forms(form)
        form.eval()
        return form

    def install(self, run: Run) -> None:
        if self._bare:
            self.model.forward = run
            return
        self.model.backbone = StandIn(run)
        if self._neck is not None:
            self.model.neck = StandIn(lambda features: features)
        if self._head is not None:  # its predict() resizes what forward() returns
            self.model.decode_head.forward = lambda features: features[0]

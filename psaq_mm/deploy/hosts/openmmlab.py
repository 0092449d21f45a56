# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Detectors of mmdet and segmentors of mmseg with a Swin backbone.

Backbone, neck and the convolutional head behind them become the graph: of a
detector the dense head (the RPN, or that of a single-stage detector), of a
segmentor the decode head. What comes after (proposals, RoIAlign, RoI heads,
NMS, resizing) stays the host's.
"""
import copy
from typing import Any, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psaq_mm.adapters.openmmlab_taps import dense_head
from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp

from ..adaptive_pool import use_pool_forms
from ..export_forms import patches_linear, quantize_input
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
    """The patch embedding, with sizes that may vary: patches become rows, and the
    convolution a linear layer, of which engines find the integers."""

    def __init__(self, backbone: Any, fixed: Optional[Size]) -> None:
        super().__init__()
        self.host, self.fixed = backbone.patch_embed, fixed
        projection = self.host.projection
        self.patch = tuple(projection.kernel_size)
        if tuple(projection.stride) != self.patch or any(projection.padding):
            raise UserError('backbone.patch_embed: patches that overlap cannot be exported')
        self.project = patches_linear(projection)
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
        (rows, cols), channels = self.patch, images.shape[1]
        size = images.shape[2] // rows, images.shape[3] // cols
        # Once more behind the reordering: see AttentionForm.
        x = quantize_input(self.project, images)
        x = x.reshape(-1, channels, size[0], rows, size[1], cols).permute(0, 2, 4, 1, 3, 5)
        x = self.project(x.reshape(-1, size[0] * size[1], channels * rows * cols))
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
    """Backbone, neck and head.

    Args:
        backbone (nn.Module): A :class:`SwinForm`.
        neck (nn.Module, optional): The host's.
        decode_head (nn.Module, optional): Of a segmentor.
        dense_head (nn.Module, optional): Of a detector.
        with_features (bool): Whether a detector's features are outputs too.
    """

    def __init__(self, backbone: nn.Module, neck: Optional[nn.Module],
                 decode_head: Optional[nn.Module], dense_head: Optional[nn.Module],
                 with_features: bool) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck
        self.decode_head, self.dense_head = decode_head, dense_head
        self.with_features = with_features

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        features: Any = []
        for tokens, height, width in self.backbone(images):
            channels = tokens.shape[-1]
            features.append(tokens.reshape(-1, height, width, channels).permute(0, 3, 1, 2))
        if self.neck is not None:
            features = self.neck(tuple(features))
        return _outputs(tuple(features), self.decode_head, self.dense_head, self.with_features)


def _outputs(features: Tuple[Tensor, ...], decode_head: Any, dense_head: Any,
             with_features: bool) -> Tuple[Tensor, ...]:
    """What the graph gives: the heads' own results, kind by kind and level by level."""
    if decode_head is not None:
        return (decode_head.forward(features), )
    if dense_head is None:
        return features
    dense = tuple(level for kind in dense_head.forward(features) for level in kind)
    return features + dense if with_features else dense


def _dense_names(head: Any, levels: int) -> Tuple[str, ...]:
    """Names of a dense head's outputs, one for each kind and level; empty for a
    head that does not score every position of every level."""
    head = copy.deepcopy(head).eval()
    device = next(head.parameters()).device
    with torch.no_grad():
        try:
            found = head.forward([torch.zeros(1, head.in_channels, 2, 2, device=device)
                                  for _ in range(levels)])
        except Exception:  # it is a program that wants more than features
            return ()
    kinds = len(found) if isinstance(found, tuple) else 0
    if kinds not in (2, 3) or any(len(kind) != levels or any(
            not isinstance(x, Tensor) or x.dim() != 4 for x in kind) for kind in found):
        return ()
    return tuple(f'{kind}_{level}' for kind in ('scores', 'deltas', 'centerness')[:kinds]
                 for level in range(levels))


class OpenMMLabPart(GraphPart):
    """Backbone, neck and the head behind them."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        bare = not hasattr(model, 'backbone')
        self._bare = bare
        self._backbone = model if bare else model.backbone
        self._neck: Any = None if bare else getattr(model, 'neck', None)
        decode_head = None if bare else getattr(model, 'decode_head', None)
        # A cascade of decode heads stays the host's.
        self._decode_head = None if isinstance(decode_head, nn.ModuleList) else decode_head
        count = len(self._backbone.out_indices)
        if self._neck is not None:
            count = getattr(self._neck, 'num_outs', count)
        self._features = tuple(f'feature_{index}' for index in range(count))
        self._dense_head: Any = None if bare or decode_head is not None else dense_head(model)
        self._dense: Tuple[str, ...] = ()
        if self._dense_head is not None:
            self._dense = _dense_names(self._dense_head, count)
            self._dense_head = self._dense_head if self._dense else None
        # RoI heads need the features too.
        self._with_features = getattr(model, 'roi_head', None) is not None

    @property
    def name(self) -> str:
        if self._bare:
            return 'backbone'
        parts = ['backbone', *(['neck'] if self._neck is not None else [])]
        if self._decode_head is not None:
            parts.append('decode_head')
        if self._dense_head is not None:
            parts.append('rpn_head' if self._with_features else 'bbox_head')
        return ' + '.join(parts)

    @property
    def output_names(self) -> Tuple[str, ...]:
        if self._decode_head is not None:
            return ('logits', )
        if self._dense_head is None:
            return self._features
        return self._features + self._dense if self._with_features else self._dense

    @property
    def channels(self) -> int:
        return int(self._backbone.patch_embed.projection.in_channels)

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        features = self._backbone(images)
        if self._neck is not None:
            features = self._neck(features)
        return _outputs(tuple(features), self._decode_head, self._dense_head,
                        self._with_features)

    def export_form(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        backbone, neck, decode_head, dense = copy.deepcopy(
            (self._backbone, self._neck, self._decode_head, self._dense_head))
        form = OpenMMLabForm(swin_form(backbone, size, batch), neck, decode_head, dense,
                             self._with_features)
        use_pool_forms(form)
        form.eval()
        return form

    def install(self, run: Run) -> None:
        if self._bare:
            self.model.forward = run
            return
        if self._neck is not None:
            self.model.neck = StandIn(lambda features: features)
        if self._decode_head is not None:  # its predict() resizes what forward() returns
            self.model.decode_head.forward = lambda features: features[0]
        if self._dense_head is None:
            self.model.backbone = StandIn(run)
            return
        standing = DenseHeadStandIn(run, len(self._features) if self._with_features else 0,
                                    len(self._features))
        self.model.backbone = StandIn(standing.features)
        self._dense_head.forward = standing.forward


class DenseHeadStandIn:
    """Splits what a graph computes between the features and the dense head.

    Args:
        run (Callable): The graph.
        features (int): How many of its outputs are features, the first ones.
        levels (int): Levels of the head.
    """

    def __init__(self, run: Run, features: int, levels: int) -> None:
        self.run, self.count, self.levels = run, features, levels
        self._seen: Tuple[Tensor, ...] = ()
        self._dense: Tuple[Tensor, ...] = ()

    def features(self, images: Tensor) -> Tuple[Tensor, ...]:
        """The features, or all outputs where the graph gives none."""
        outputs = self.run(images)
        self._dense = outputs[self.count:]
        self._seen = outputs[:self.count] or outputs
        return self._seen

    def forward(self, features: Tuple[Tensor, ...]) -> Tuple[List[Tensor], ...]:
        """What the head would give for the features of the last images.

        Raises:
            RuntimeError: If they are others.
        """
        if features is not self._seen:
            raise RuntimeError('a graph has the dense head within: it gives its results for the '
                               'features of the last images only')
        return tuple(list(self._dense[i:i + self.levels])
                     for i in range(0, len(self._dense), self.levels))

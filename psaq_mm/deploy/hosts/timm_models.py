# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Classifiers of timm: the whole model becomes the graph."""
import copy
from typing import Any, List, Optional, Tuple

from torch import Tensor, nn

from psaq_mm.ops import QuantOp

from ..graph_part import GraphPart, Run, Size, StandIn
from ..swin import AttentionForm, BlockForm, MergeForm, StageForm, SwinForm

NEIGHBOURS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""Patches that timm's patch merging puts side by side."""


class TimmBlock(BlockForm):
    """A SwinTransformerBlock, or its quantized op."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.host = block
        self.window, self.shift = tuple(block.window_size), tuple(block.shift_size)
        bias = block.attn._get_rel_pos_bias().squeeze(0)
        self.attention = AttentionForm(block.attn, bias, self.window, self.shift)

    def normalize(self, x: Tensor) -> Tensor:
        return self.host.norm1(x)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self._quantize('attention_residual', x + attended)
        return self._quantize('ffn_residual', x + self.host.mlp(self.host.norm2(x)))

    def _quantize(self, role: str, x: Tensor) -> Tensor:
        return self.host.quantize(role, x) if isinstance(self.host, QuantOp) else x


class TimmSwinForm(nn.Module):
    """timm's Swin Transformer for one size of images."""

    def __init__(self, model: Any, size: Size, batch: int) -> None:
        super().__init__()
        self.head = model
        last = len(model.layers) - 1
        stages: List[StageForm] = []
        for index, layer in enumerate(model.layers):
            merge = None
            if not isinstance(layer.downsample, nn.Identity):
                merge = MergeForm(layer.downsample.norm, layer.downsample.reduction, NEIGHBOURS)
            stages.append(StageForm(merge, [TimmBlock(block) for block in layer.blocks],
                                    model.norm if index == last else None))
        patch = model.patch_embed.patch_size
        self.backbone = SwinForm(self._embed, stages, True,
                                 (size[0] // patch[0], size[1] // patch[1]), batch)

    def _embed(self, images: Tensor) -> Tuple[Tensor, Tuple[Any, Any]]:
        x = self.head.patch_embed(images)  # (B, h, w, C)
        return x.flatten(1, 2), (x.shape[1], x.shape[2])

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        (tokens, height, width), = self.backbone(images)
        features = tokens.reshape(-1, height, width, tokens.shape[-1])
        return (self.head.forward_head(features), )


class _WholeForm(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return (self.model(images), )


class TimmPart(GraphPart):
    """A bare model of timm, or that of a ``TimmClassifier``."""

    @property
    def _model(self) -> Any:
        return getattr(self.model, 'model', self.model)

    @property
    def name(self) -> str:
        return 'classifier'

    @property
    def output_names(self) -> Tuple[str, ...]:
        return ('logits', )

    @property
    def channels(self) -> int:
        return int(self._model.in_chans)

    @property
    def fixed_size(self) -> Optional[Size]:
        height, width = self._model.patch_embed.img_size
        return int(height), int(width)

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        return (self._model(images), )

    def export_form(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        form = _WholeForm(copy.deepcopy(self._model))
        form.eval()
        return form

    def install(self, run: Run) -> None:
        stand_in = StandIn(lambda images: run(images)[0])
        if self._model is self.model:
            self.model.forward = stand_in.forward
        else:
            self.model.model = stand_in


class TimmViTPart(TimmPart):
    """A ViT or DeiT: its attention is traced as it is."""


class TimmSwinPart(TimmPart):
    """A Swin Transformer of timm."""

    def export_form(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        fixed = size or self.fixed_size
        assert fixed is not None
        form = TimmSwinForm(copy.deepcopy(self._model), fixed, batch)
        form.eval()
        return form

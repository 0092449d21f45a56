# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Classifiers of timm: the whole model is exported."""
import copy
from typing import Any, List, Optional, Tuple

from torch import Tensor, nn

from ..exportable_swin import ExportableBlock, ExportableMerging, ExportableStage, ExportableSwin
from ..subgraph import FunctionModule, Run, Size, Subgraph

NEIGHBOURS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""The order in which timm's patch merging concatenates patches."""


class TimmBlock(ExportableBlock):
    """A SwinTransformerBlock, or its quantized op."""

    def __init__(self, block: Any) -> None:
        super().__init__(block, block.attn, block.attn._get_rel_pos_bias().squeeze(0),
                         tuple(block.window_size), tuple(block.shift_size))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.host.mlp(self.host.norm2(x))


class ExportableTimmSwin(nn.Module):
    """timm's Swin Transformer for one size of images."""

    def __init__(self, model: Any, size: Size, batch: int) -> None:
        super().__init__()
        self.head = model
        last = len(model.layers) - 1
        stages: List[ExportableStage] = []
        for index, layer in enumerate(model.layers):
            merge = None
            if not isinstance(layer.downsample, nn.Identity):
                merge = ExportableMerging(layer.downsample.norm, layer.downsample.reduction,
                                          NEIGHBOURS)
            stages.append(ExportableStage(merge, [TimmBlock(block) for block in layer.blocks],
                                          model.norm if index == last else None))
        patch = model.patch_embed.patch_size
        self.backbone = ExportableSwin(self._embed, stages, True,
                                       (size[0] // patch[0], size[1] // patch[1]), batch)

    def _embed(self, images: Tensor) -> Tuple[Tensor, Tuple[Any, Any]]:
        x = self.head.patch_embed(images)  # (B, h, w, C)
        return x.flatten(1, 2), (x.shape[1], x.shape[2])

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        (tokens, height, width), = self.backbone(images)
        features = tokens.reshape(-1, height, width, tokens.shape[-1])
        return (self.head.forward_head(features), )


class ExportableClassifier(nn.Module):
    """A classifier that is traced as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return (self.model(images), )


class TimmSubgraph(Subgraph):
    """A model of timm, bare or in a ``TimmClassifier``. A ViT or DeiT is traced
    as it is."""

    modules = 'classifier'
    output_names = ('logits', )

    @property
    def _model(self) -> Any:
        return getattr(self.model, 'model', self.model)

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        return (self._model(images), )

    def exportable(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        return ExportableClassifier(copy.deepcopy(self._model)).eval()

    def install(self, run: Run) -> None:
        module = FunctionModule(lambda images: run(images)[0])
        if self._model is self.model:
            self.model.forward = module.forward
        else:
            self.model.model = module


class TimmSwinSubgraph(TimmSubgraph):
    """A Swin Transformer of timm, bare or in a ``TimmClassifier``."""

    def exportable(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        size = size or self.fixed_size
        assert size is not None
        return ExportableTimmSwin(copy.deepcopy(self._model), size, batch).eval()

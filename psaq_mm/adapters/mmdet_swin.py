# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""mmdet's Swin Transformer, alone or as the backbone of any model."""
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock, SwinTransformer, WindowMSA
from mmdet.models.layers import PatchEmbed, PatchMerging

from psaq_mm.ops import register_op
from psaq_mm.registry import ADAPTERS

from .openmmlab_ops import PatchEmbedOp, SwinBlockOp, WindowMSAOp
from .openmmlab_swin import NORMS_OF_BLOCK, NORMS_OF_MERGING, OpenMMLabSwinAdapter


@register_op(WindowMSA)
class QuantWindowMSA(WindowMSAOp, WindowMSA):
    """Window attention with its two matmuls quantized."""


@register_op(SwinBlock)
class QuantSwinBlock(SwinBlockOp, SwinBlock):
    """Swin block with the residual stream quantized after both additions."""


@register_op(PatchEmbed)
class QuantPatchEmbed(PatchEmbedOp, PatchEmbed):
    """Patch embedding with its output, after the norm, quantized."""


@ADAPTERS.register_module()
class MMDetSwinAdapter(OpenMMLabSwinAdapter):
    """Models with mmdet's Swin Transformer."""

    backbone_class = SwinTransformer
    shift_window_class = ShiftWindowMSA
    norm_readers_of = {SwinBlock: NORMS_OF_BLOCK, PatchMerging: NORMS_OF_MERGING}

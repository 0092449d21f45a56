# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""mmseg's Swin Transformer, alone or as the backbone of any model."""
from mmseg.models.backbones.swin import (
    PatchMerging,
    ShiftWindowMSA,
    SwinBlock,
    SwinTransformer,
    WindowMSA,
)
from mmseg.models.utils import PatchEmbed

from psaq_mm.ops import register_op
from psaq_mm.registry import ADAPTERS

from .openmmlab_ops import PatchEmbedOp, SwinBlockOp, WindowMSAOp
from .openmmlab_swin import NORMS_OF_BLOCK, NORMS_OF_MERGING, OpenMMLabSwinAdapter


@register_op(WindowMSA)
class QuantMMSegWindowMSA(WindowMSAOp, WindowMSA):
    """Window attention with its two matmuls quantized."""


@register_op(SwinBlock)
class QuantMMSegSwinBlock(SwinBlockOp, SwinBlock):
    """Swin block with the residual stream quantized after both additions."""


@register_op(PatchEmbed)
class QuantMMSegPatchEmbed(PatchEmbedOp, PatchEmbed):
    """Patch embedding with its output, after the norm, quantized."""


@ADAPTERS.register_module()
class MMSegSwinAdapter(OpenMMLabSwinAdapter):
    """Models with mmseg's Swin Transformer."""

    backbone_class = SwinTransformer
    shift_window_class = ShiftWindowMSA
    norm_readers_of = {SwinBlock: NORMS_OF_BLOCK, PatchMerging: NORMS_OF_MERGING}

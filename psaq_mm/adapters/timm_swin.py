# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""timm's Swin Transformer, alone or in a ``TimmClassifier``."""
from contextlib import ExitStack
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    checkpoint_filter_fn,
    window_partition,
)
from torch import Tensor, nn

from psaq_mm.ops import QuantOp, register_op
from psaq_mm.prior import AttentionRecord
from psaq_mm.registry import ADAPTERS

from .quantized_attention import WINDOW_ROLES, attend_in_windows
from .recorder import AttentionRecorder
from .timm_adapter import NORMS_OF_BLOCK, PSAQ_MM, TIMM, TimmAdapter
from .window_grid import WindowGrid

SWIN_AUTHORS = 'Swin authors (classification)'


@register_op(WindowAttention)
class QuantTimmWindowAttention(QuantOp, WindowAttention):
    """Window attention with its two matmuls quantized.

    Modifications: as said in ``quantized_attention.py``; the fused attention
    of torch, which shows none of the operands, is not used.
    """

    roles = WINDOW_ROLES

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Args:
            x (Tensor): Input features with shape of (num_windows*B, N, C).
            mask (Tensor, optional): Shape (num_windows, N, N), 0 or -100.
                Defaults to None.

        Returns:
            Tensor: Shape (num_windows*B, N, C).
        """
        return attend_in_windows(self, x, self._get_rel_pos_bias().squeeze(0), mask)


@register_op(SwinTransformerBlock)
class QuantTimmSwinBlock(QuantOp, SwinTransformerBlock):
    """Swin block with the residual stream quantized after both additions."""

    roles = dict(attention_residual=-1, ffn_residual=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Args:
            x (Tensor): Shape (B, H, W, C).

        Returns:
            Tensor: Shape (B, H, W, C).
        """
        shape = x.shape
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        x = self.quantize('attention_residual', x).reshape(shape[0], -1, shape[-1])
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return self.quantize('ffn_residual', x).reshape(shape)


@ADAPTERS.register_module()
class TimmSwinAdapter(TimmAdapter):
    """timm's Swin Transformer, alone or in a ``TimmClassifier``."""

    model_class = SwinTransformer
    block_prefix = 'layers.'
    norm_readers_of = {SwinTransformerBlock: NORMS_OF_BLOCK,
                       PatchMerging: {'norm': 'reduction'}}
    layouts = {PSAQ_MM: 'model.layers.0.blocks.0.attn.qkv.weight',
               TIMM: 'layers.0.blocks.0.attn.qkv.weight',
               SWIN_AUTHORS: 'layers.0.downsample.reduction.weight'}

    def attention_windows(self, model: nn.Module) -> List[WindowGrid]:
        swin = self._timm_model(model)
        # A stage merges patches, two by two, at its beginning.
        return [(tuple(swin.patch_embed.patch_size) if not index else
                 (1, 1) if isinstance(stage.downsample, nn.Identity) else (2, 2),
                 stage.blocks[0].window_size) for index, stage in enumerate(swin.layers)]

    def _is_foreign(self, state: Mapping[str, Tensor]) -> bool:
        # The authors merge patches at the end of a stage, timm at the start.
        return 'layers.0.downsample.reduction.weight' in state

    def _from_timm(self, model: Any, state: Mapping[str, Tensor]) \
            -> Tuple[Dict[str, Tensor], str]:
        # timm's filter would fit these to the model by resizing, or fail where
        # the model lacks the block. It leaves their names alone: held back,
        # those of another model are reported as different.
        held = {key: value for key, value in state.items() if key.endswith(
            ('patch_embed.proj.weight', 'relative_position_bias_table'))}
        rest = {key: value for key, value in state.items() if key not in held}
        return {**checkpoint_filter_fn(rest, model), **held}, \
            SWIN_AUTHORS if self._is_foreign(state) else TIMM

    def _stages(self, model: Any) -> List[nn.Module]:
        return list(model.layers)

    def _record(self, model: Any, recorder: AttentionRecorder, hooks: ExitStack) -> None:
        for module in model.modules():
            if isinstance(module, SwinTransformerBlock):
                self._record_block(module, recorder, hooks)

    @staticmethod
    def _record_block(block: Any, recorder: AttentionRecorder, hooks: ExitStack) -> None:
        shape: List[int] = []

        def note_shape(module: nn.Module, args: Any) -> None:
            shape[:] = args[0].shape[1:3]

        def note_output(module: nn.Module, args: Any) -> None:
            # The input of `proj` is attn @ v with the heads side by side.
            valid = window_validity(shape[0], shape[1], block.window_size)
            recorder.records.append(AttentionRecord(
                output=args[0].unflatten(-1, (block.attn.num_heads, -1)),
                valid=None if valid is None else valid.to(args[0].device)))

        hooks.enter_context(block.register_forward_pre_hook(note_shape))
        hooks.enter_context(block.attn.proj.register_forward_pre_hook(note_output))


def window_validity(height: int, width: int, window: Tuple[int, int]) -> Optional[Tensor]:
    """Mark the real tokens of each window.

    timm's Swin rolls a feature map first and then zero-pads it at the right
    and bottom, so that padding always stands there; mmdet's pads first.
    Windows need not be square: timm shrinks them to small feature maps.

    Args:
        height (int): Height of the feature map.
        width (int): Width of the feature map.
        window (tuple[int, int]): Height and width of a window.

    Returns:
        Tensor, optional: Boolean of shape (num_windows, window area), True
        for real tokens; None if there is no padding.
    """
    pad_h, pad_w = -height % window[0], -width % window[1]
    if not pad_h and not pad_w:
        return None
    valid = F.pad(torch.ones(1, height, width, 1), (0, 0, 0, pad_w, 0, pad_h))
    return window_partition(valid, window).flatten(1) == 1

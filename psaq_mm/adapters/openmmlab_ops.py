# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized parts of a Swin Transformer of mmdet or mmseg, to be mixed into each host's own."""
from typing import Optional, Tuple

from torch import Tensor, nn

from psaq_mm.ops import QuantOp

from .quantized_attention import WINDOW_ROLES, attend_in_windows


class WindowMSAOp(QuantOp):
    """Window attention with its two matmuls quantized.

    Modifications: as said in ``quantized_attention.py``, and nothing else;
    ``qkv`` and ``proj`` are ops of their own.
    """

    roles = WINDOW_ROLES

    num_heads: int
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Args:
            x (Tensor): Input features with shape of (num_windows*B, N, C).
            mask (Tensor, optional): Shape (num_windows, N, N), 0 or -100.
                Defaults to None.

        Returns:
            Tensor: Shape (num_windows*B, N, C).
        """
        n_tokens = x.shape[1]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(n_tokens, n_tokens, self.num_heads).permute(2, 0, 1).contiguous()
        return attend_in_windows(self, x, bias, mask)


class SwinBlockOp(QuantOp):
    """Swin block with the residual stream quantized after both additions.

    Modifications: as said; activation checkpointing is not supported.
    """

    roles = dict(attention_residual=-1, ffn_residual=-1)

    norm1: nn.Module
    norm2: nn.Module
    attn: nn.Module
    ffn: nn.Module

    def forward(self, x: Tensor, hw_shape: Tuple[int, int]) -> Tensor:
        """Args:
            x (Tensor): Shape (B, H*W, C).
            hw_shape (tuple[int, int]): H and W.

        Returns:
            Tensor: Shape (B, H*W, C).
        """
        x = self.quantize('attention_residual', x + self.attn(self.norm1(x), hw_shape))
        return self.quantize('ffn_residual', self.ffn(self.norm2(x), identity=x))


class PatchEmbedOp(QuantOp):
    """Patch embedding with its output, after the norm, quantized."""

    roles = dict(output=-1)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tuple[int, int]]:
        """Args:
            x (Tensor): Images of shape (B, C, H, W).

        Returns:
            tuple: Tokens of shape (B, h*w, embed_dims), and (h, w).
        """
        tokens, hw_shape = super().forward(x)
        return self.quantize('output', tokens), hw_shape

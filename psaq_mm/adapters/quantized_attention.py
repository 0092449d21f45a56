# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the quantized attention modules of all hosts compute between qkv and proj.

The quantizers are those of the module, by role: query, key, softmax output and
value pass them before the matmuls that consume them (placement ``operands``),
or the logits and the position bias do (placement ``v1``). The channel axis of
all of them is the head.
"""
from typing import Any, Callable, Optional

from torch import Tensor

ROLES = dict(query=1, key=1, attention=1, value=1, logits=1)
"""Role to channel axis."""

WINDOW_ROLES = dict(ROLES, bias_table=0)
"""The same of window attention, with its relative position bias."""


def attend(op: Any, q: Tensor, k: Tensor, v: Tensor,
           complete: Callable[[Tensor], Tensor]) -> Tensor:
    """Attention with both matmuls quantized.

    Args:
        op (QuantOp): With ``scale`` and ``attn_drop``, as all hosts have them.
        q (Tensor): Queries, shape (B, heads, N, head_dim), not scaled.
        k (Tensor): Keys, same shape.
        v (Tensor): Values, same shape.
        complete (Callable): Adds to the logits, shape (B, heads, N, N), what
            belongs there: bias and mask.

    Returns:
        Tensor: attention @ value with the heads side by side, shape
        (B, N, heads * head_dim).
    """
    q = op.quantize('query', q * op.scale)
    k = op.quantize('key', k)
    logits = complete(op.quantize('logits', q @ k.transpose(-2, -1)))
    attention = op.quantize('attention', op.attn_drop(logits.softmax(dim=-1)))
    return (attention @ op.quantize('value', v)).transpose(1, 2).flatten(2)


def attend_in_windows(op: Any, x: Tensor, bias: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Window attention with both matmuls quantized.

    Args:
        op (QuantOp): With ``qkv``, ``num_heads``, ``proj`` and ``proj_drop``, and what
            :func:`attend` needs.
        x (Tensor): Shape (num_windows*B, N, C).
        bias (Tensor): Relative position bias, shape (heads, N, N).
        mask (Tensor, optional): Shape (num_windows, N, N), 0 or -100.

    Returns:
        Tensor: Shape (num_windows*B, N, C).
    """
    n_windows, n_tokens, _ = x.shape
    qkv = op.qkv(x).reshape(n_windows, n_tokens, 3, op.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (num_windows*B, heads, N, head_dim) each
    out = attend(op, q, k, v, lambda logits: _add_window_bias(op, logits, bias, mask))
    return op.proj_drop(op.proj(out))


def _add_window_bias(op: Any, logits: Tensor, bias: Tensor,
                     mask: Optional[Tensor]) -> Tensor:
    """Add the relative position bias and the mask of shifted windows.

    Args:
        op (QuantOp): Quantizes the bias.
        logits (Tensor): Shape (num_windows*B, heads, N, N).
        bias (Tensor): Shape (heads, N, N).
        mask (Tensor, optional): Shape (num_windows, N, N), 0 or -100.

    Returns:
        Tensor: Shape (num_windows*B, heads, N, N).
    """
    logits = logits + op.quantize('bias_table', bias).unsqueeze(0)
    if mask is None:
        return logits
    by_image = logits.view(-1, mask.shape[0], *logits.shape[1:])
    return (by_image + mask.unsqueeze(1).unsqueeze(0)).view(logits.shape)

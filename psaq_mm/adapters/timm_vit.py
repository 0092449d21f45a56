# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""timm's Vision Transformer, DeiT among them, alone or in a ``TimmClassifier``."""
from contextlib import ExitStack
from typing import Any, Dict, List, Mapping, Optional, Tuple

from timm.layers import Attention, maybe_add_mask, resolve_self_attn_mask
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp, register_op
from psaq_mm.prior import AttentionRecord
from psaq_mm.registry import ADAPTERS

from .quantized_attention import ROLES, attend
from .recorder import AttentionRecorder
from .timm_adapter import NORMS_OF_BLOCK, PSAQ_MM, TIMM, TimmAdapter

DEIT_III_AUTHORS = 'DeiT III authors'


@register_op(Attention)
class QuantTimmAttention(QuantOp, Attention):
    """Attention over all tokens with its two matmuls quantized.

    Modifications: as said in ``quantized_attention.py``; the fused attention
    of torch, which shows none of the operands, is not used.
    """

    roles = ROLES

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None,
                is_causal: bool = False) -> Tensor:
        """Args:
            x (Tensor): Input features with shape of (B, N, C).
            attn_mask (Tensor, optional): Boolean, or added to the logits;
                broadcast to (B, heads, N, N). Defaults to None.
            is_causal (bool): Whether a token sees only those before it.
                Defaults to False.

        Returns:
            Tensor: Shape (B, N, C).
        """
        batch, n_tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, n_tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, head_dim) each
        q, k = self.q_norm(q), self.k_norm(k)

        def masked(logits: Tensor) -> Tensor:
            mask = resolve_self_attn_mask(n_tokens, logits, attn_mask, is_causal)
            return maybe_add_mask(logits, mask)

        out = self.norm(attend(self, q, k, v, masked))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


@register_op(Block)
class QuantTimmViTBlock(QuantOp, Block):
    """Block with the residual stream quantized after both additions."""

    roles = dict(attention_residual=-1, ffn_residual=-1)

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None,
                is_causal: bool = False) -> Tensor:
        """Args:
            x (Tensor): Shape (B, N, C).
            attn_mask (Tensor, optional): As of the attention. Defaults to None.
            is_causal (bool): As of the attention. Defaults to False.

        Returns:
            Tensor: Shape (B, N, C).
        """
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.quantize('attention_residual', x + self.drop_path1(self.ls1(attended)))
        return self.quantize('ffn_residual',
                             x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


@ADAPTERS.register_module()
class TimmViTAdapter(TimmAdapter):
    """timm's Vision Transformer, alone or in a ``TimmClassifier``."""

    model_class = VisionTransformer
    block_prefix = 'blocks.'
    norm_readers_of = {Block: NORMS_OF_BLOCK}
    layouts = {PSAQ_MM: 'model.blocks.0.attn.qkv.weight',
               TIMM: 'blocks.0.attn.qkv.weight',  # DeiT's authors, too
               DEIT_III_AUTHORS: 'blocks.0.gamma_1'}

    def _is_foreign(self, state: Mapping[str, Tensor]) -> bool:
        return 'blocks.0.gamma_1' in state

    def _from_timm(self, model: Any, state: Mapping[str, Tensor]) \
            -> Tuple[Dict[str, Tensor], str]:
        if not self._is_foreign(state):
            return dict(state), TIMM
        # timm's filter would fit these to the model by resizing. It leaves
        # their names alone: held back, those of another model are reported.
        held = {key: value for key, value in state.items()
                if key in ('patch_embed.proj.weight', 'pos_embed')}
        rest = {key: value for key, value in state.items() if key not in held}
        converted = checkpoint_filter_fn(rest, model, adapt_layer_scale=True)
        return {**converted, **held}, DEIT_III_AUTHORS

    def _stages(self, model: Any) -> List[nn.Module]:
        # A ViT has no stages: the ends of four equal parts, as many as Swin has [choice].
        count = len(model.blocks)
        return [model.blocks[i] for i in sorted({count * part // 4 - 1 for part in (1, 2, 3, 4)})
                if i >= 0]

    def _record(self, model: Any, recorder: AttentionRecorder, hooks: ExitStack) -> None:
        attentions = [module for module in model.blocks.modules()
                      if isinstance(module, Attention)]
        if not attentions:
            raise UserError(f'the blocks of the model, {type(model.blocks[0]).__name__}, have no '
                            'attention that images could be synthesized from')
        for attention in attentions:
            self._record_attention(attention, model.num_prefix_tokens, recorder, hooks)

    @staticmethod
    def _record_attention(attention: Any, prefix_tokens: int, recorder: AttentionRecorder,
                          hooks: ExitStack) -> None:

        def note_output(module: nn.Module, args: Any) -> None:
            # The input of `norm`, most often an identity, is attn @ v with the
            # heads side by side. Class and distillation tokens have no place
            # in the image; V1 drops them too [v1].
            output = args[0].unflatten(-1, (attention.num_heads, -1))
            recorder.records.append(AttentionRecord(output=output[:, prefix_tokens:]))

        hooks.enter_context(attention.norm.register_forward_pre_hook(note_output))

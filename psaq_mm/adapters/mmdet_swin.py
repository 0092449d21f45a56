# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""mmdet's Swin Transformer, alone or as the backbone of any mmdet model."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock, SwinTransformer, WindowMSA
from mmdet.models.layers import PatchEmbed
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp, register_op
from psaq_mm.prior import AttentionRecord
from psaq_mm.registry import ADAPTERS

from .adapter import Adapter, AttentionRecorder
from .window_tokens import valid_tokens


@register_op(WindowMSA)
class QuantWindowMSA(QuantOp, WindowMSA):
    """Window attention with its two matmuls quantized.

    Modifications:
        - query, key, softmax output and value pass quantizers before the
          matmuls that consume them (placement ``operands``), or the logits
          and the position bias do (placement ``v1``);
        - nothing else: ``qkv`` and ``proj`` are ops of their own.

    The channel axis of all of them is the head.
    """

    roles = dict(query=1, key=1, attention=1, value=1, logits=1, bias_table=0)

    num_heads: int
    scale: float
    relative_position_bias_table: Tensor
    relative_position_index: Tensor
    qkv: nn.Module
    softmax: nn.Module
    attn_drop: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Args:
            x (Tensor): Input features with shape of (num_windows*B, N, C).
            mask (Tensor, optional): Shape (num_windows, N, N), 0 or -100.
                Defaults to None.

        Returns:
            Tensor: Shape (num_windows*B, N, C).
        """
        n_windows, n_tokens, channels = x.shape
        heads = self.num_heads
        qkv = self.qkv(x).reshape(n_windows, n_tokens, 3, heads, channels // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (num_windows*B, heads, N, head_dim) each
        q = self.quantize('query', q * self.scale)
        k = self.quantize('key', k)
        logits = self.quantize('logits', q @ k.transpose(-2, -1))
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(n_tokens, n_tokens, heads).permute(2, 0, 1).contiguous()
        logits = logits + self.quantize('bias_table', bias).unsqueeze(0)
        if mask is not None:
            logits = logits.view(-1, mask.shape[0], heads, n_tokens, n_tokens)
            logits = logits + mask.unsqueeze(1).unsqueeze(0)
            logits = logits.view(-1, heads, n_tokens, n_tokens)
        attention = self.attn_drop(self.softmax(logits))
        attention = self.quantize('attention', attention)
        out = attention @ self.quantize('value', v)
        out = out.transpose(1, 2).reshape(n_windows, n_tokens, channels)
        return self.proj_drop(self.proj(out))


@register_op(SwinBlock)
class QuantSwinBlock(QuantOp, SwinBlock):
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


@register_op(PatchEmbed)
class QuantPatchEmbed(QuantOp, PatchEmbed):
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


@ADAPTERS.register_module()
class MMDetSwinAdapter(Adapter):
    """mmdet models whose ``backbone`` is a Swin Transformer, or that alone."""

    V1_OUTPUTS = ('patch_embed', 'attn.w_msa.qkv', 'attn.w_msa.proj', 'ffn.layers.1',
                  'downsample.reduction')
    """Ends of the names of modules whose output V1 quantizes [v1]."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(getattr(model, 'backbone', model), SwinTransformer)

    def backbone_name(self, model: nn.Module) -> str:
        return '' if isinstance(model, SwinTransformer) else 'backbone'

    def is_output_point(self, model: nn.Module, name: str) -> bool:
        return self.in_scope(model, name, 'backbone') and any(
            name == end or name.endswith('.' + end) for end in self.V1_OUTPUTS)

    def is_patch_embed(self, model: nn.Module, name: str) -> bool:
        prefix = self.backbone_name(model)
        return name == (prefix + '.' if prefix else '') + 'patch_embed.projection'

    def follows_proposals(self, model: nn.Module, name: str) -> bool:
        return name.startswith('roi_head.')

    def valid_range(self, model: nn.Module) -> Tuple[Tensor, Tensor]:
        channels = self._backbone(model).patch_embed.projection.in_channels
        low, high = torch.zeros(channels), torch.full((channels, ), 255.)
        preprocessor = getattr(model, 'data_preprocessor', None)
        mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
        if isinstance(mean, Tensor) and isinstance(std, Tensor):
            mean, std = mean.flatten().cpu(), std.flatten().cpu()
            if mean.numel() not in (1, channels) or (std <= 0).any():
                raise UserError('model.data_preprocessor: mean and std must have one value for '
                                f'each of {channels} channels, and std must be positive')
            low, high = (low - mean) / std, (high - mean) / std
        return low.view(1, -1, 1, 1), high.view(1, -1, 1, 1)

    def forward_backbone(self, model: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
        return tuple(self._backbone(model)(images))

    def forward_model(self, model: nn.Module, images: Tensor) -> None:
        if isinstance(model, SwinTransformer):
            raise UserError("quantization.scope='model' needs a whole detector, got a backbone")
        size = (images.shape[2], images.shape[3])
        samples = []
        for index in range(images.shape[0]):
            sample = DetDataSample()
            sample.set_metainfo(dict(img_id=index, img_shape=size, ori_shape=size,
                                     pad_shape=size, batch_input_shape=size,
                                     scale_factor=(1.0, 1.0)))
            samples.append(sample)
        # 'tensor' mode runs RoI heads on the region proposals themselves, so
        # every head sees data even where nothing is detected.
        model(images, samples, mode='tensor')

    @contextmanager
    def record_attention(self, model: nn.Module) -> Iterator[AttentionRecorder]:
        recorder = AttentionRecorder()
        handles: List[Any] = []
        checkpointed: Dict[nn.Module, bool] = {}
        backbone = self._backbone(model)
        for module in backbone.modules():
            if isinstance(module, SwinBlock):
                # Recomputed activations would not be the recorded ones.
                checkpointed[module] = module.with_cp
                module.with_cp = False
            if isinstance(module, ShiftWindowMSA):
                self._record_block(module, recorder, handles)
        try:
            yield recorder
        finally:
            for handle in handles:
                handle.remove()
            for module, with_cp in checkpointed.items():
                module.with_cp = with_cp  # type: ignore[assignment]

    @staticmethod
    def _record_block(block: ShiftWindowMSA, recorder: AttentionRecorder,
                      handles: List[Any]) -> None:
        shape: Dict[str, Tuple[int, int]] = {}

        def note_shape(module: nn.Module, args: Any, kwargs: Any) -> None:
            shape['hw'] = kwargs['hw_shape'] if 'hw_shape' in kwargs else args[1]

        def note_output(module: nn.Module, args: Any) -> None:
            # The input of `proj` is attn @ v with the heads side by side.
            heads = block.w_msa.num_heads
            height, width = shape['hw']
            valid = valid_tokens(int(height), int(width), block.window_size, block.shift_size)
            recorder.records.append(AttentionRecord(
                output=args[0].unflatten(-1, (heads, -1)),
                valid=None if valid is None else valid.to(args[0].device)))

        handles.append(block.register_forward_pre_hook(note_shape, with_kwargs=True))
        handles.append(block.w_msa.proj.register_forward_pre_hook(note_output))

    @staticmethod
    def _backbone(model: nn.Module) -> Any:
        return model if isinstance(model, SwinTransformer) else model.backbone

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What timm's Swin and ViT have in common, alone or in a ``TimmClassifier``."""
from contextlib import ExitStack
from typing import Any, ClassVar, Collection, Dict, List, Mapping, Optional, Tuple

import torch
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp, register_op

from .adapter import Adapter, shown_size
from .pixel_range import pixel_range
from .tap_record import TapRecord

PSAQ_MM = 'psaq_mm'
TIMM = 'timm'

NORMS_OF_BLOCK = {'norm1': 'attn.qkv', 'norm2': 'mlp.fc1'}
"""Names within the blocks of both, as of :attr:`Adapter.norm_readers_of`."""


@register_op(PatchEmbed)
class QuantTimmPatchEmbed(QuantOp, PatchEmbed):
    """Patch embedding with its output, after the norm, quantized."""

    roles = dict(output=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Args:
            x (Tensor): Images of shape (B, C, H, W).

        Returns:
            Tensor: Tokens of shape (B, h*w, embed_dim) or (B, h, w, embed_dim),
            as the model wants them.
        """
        return self.quantize('output', super().forward(x))


class TimmAdapter(Adapter):
    """Models of timm, alone or as the attribute ``model`` of a classifier.

    Subclasses name the class of the model, and find its attention.
    """

    model_class: ClassVar[type]

    block_prefix: ClassVar[str]
    """What the names of a model's blocks begin with."""

    HEADS = ('attn_pool', 'fc_norm', 'head', 'head_dist')
    """Modules that run after ``forward_features``."""

    V1_OUTPUTS = ('patch_embed', 'attn.qkv', 'attn.proj', 'mlp.fc2', 'downsample.reduction')
    patch_projection = 'patch_embed.proj'
    recompute_flag = 'grad_checkpointing'

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(cls._timm_model(model), cls.model_class)

    def backbone_name(self, model: nn.Module) -> str:
        return '' if isinstance(model, self.model_class) else 'model'

    def norm_readers(self, model: nn.Module) -> Dict[str, str]:
        # An attention with a gate reads its norm by that too.
        return {norm: reader for norm, reader in super().norm_readers(model).items()
                if getattr(model.get_submodule(reader.rpartition('.')[0]), 'gate', None) is None}

    def in_scope(self, model: nn.Module, name: str, scope: str) -> bool:
        if scope == 'model':
            return True
        prefix = self._prefix(model)
        return super().in_scope(model, name, scope) and not any(
            name == prefix + head or name.startswith(prefix + head + '.') for head in self.HEADS)

    def head_of(self, model: nn.Module, name: str) -> str:
        return '' if self.in_scope(model, name, 'backbone') else \
            name[len(self._prefix(model)):].partition('.')[0]

    def is_rgb(self, model: nn.Module) -> bool:
        return True

    def fixed_size(self, model: nn.Module) -> Optional[Tuple[int, int]]:
        size = getattr(self._timm_model(model).patch_embed, 'img_size', None)
        return tuple(size) if size is not None else None

    def check_image_size(self, model: nn.Module, size: Tuple[int, int],
                         key: str = 'synthesis.image_size') -> None:
        embed = self._timm_model(model).patch_embed
        if not isinstance(embed, PatchEmbed) or embed.img_size is None:
            return
        if embed.strict_img_size and tuple(size) != tuple(embed.img_size):
            raise UserError(f'{key} must be {shown_size(embed.img_size)}, the only size that the '
                            f'model takes, got {shown_size(size)}')
        if not embed.dynamic_img_pad and any(s % p for s, p in zip(size, embed.patch_size)):
            raise UserError(f'{key} must be a multiple of {shown_size(embed.patch_size)}, the '
                            f'patches of the model, got {shown_size(size)}')

    def convert_state(self, model: nn.Module,
                      state: Mapping[str, Tensor]) -> Tuple[Dict[str, Tensor], str]:
        prefix = self._prefix(model)
        if any(key.startswith(prefix + self.block_prefix) for key in state) \
                and not self._is_foreign(state):
            return dict(state), PSAQ_MM if prefix else TIMM
        if not any(key.startswith(self.block_prefix) for key in state):
            return dict(state), ''
        converted, layout = self._from_timm(self._timm_model(model), state)
        return {prefix + key: value for key, value in converted.items()}, layout

    def _is_foreign(self, state: Mapping[str, Tensor]) -> bool:
        """Whether keys that begin as the model's own are of another layout."""
        raise NotImplementedError

    def _from_timm(self, model: Any, state: Mapping[str, Tensor]) \
            -> Tuple[Dict[str, Tensor], str]:
        """Bring weights into the keys of a bare timm model, and name their layout."""
        raise NotImplementedError

    def valid_range(self, model: nn.Module) -> Tuple[Tensor, Tensor]:
        channels = self._timm_model(model).in_chans
        preprocessor = getattr(model, 'data_preprocessor', None)
        if preprocessor is not None:
            return pixel_range(channels, getattr(preprocessor, 'mean', None),
                               getattr(preprocessor, 'std', None))
        data = resolve_model_data_config(model)
        return pixel_range(channels, torch.tensor(data['mean']), torch.tensor(data['std']),
                           highest=1.)

    def forward_backbone(self, model: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
        return (self._timm_model(model).forward_features(images), )

    def forward_model(self, model: nn.Module, images: Tensor) -> Any:
        return self._timm_model(model)(images)

    def tap_groups(self, model: nn.Module) -> Tuple[str, ...]:
        return 'backbone', 'logits'

    def forward_taps(self, model: nn.Module, images: Tensor, groups: Collection[str],
                     regions: Optional[List[Tensor]] = None) -> TapRecord:
        timm_model = self._timm_model(model)
        stages: List[Tensor] = []
        with ExitStack() as hooks:
            for stage in self._stages(timm_model):
                hooks.enter_context(stage.register_forward_hook(
                    lambda m, args, out: stages.append(out)))
            logits = timm_model(images)
        taps = {f'backbone.{i}': stage for i, stage in enumerate(stages)} \
            if 'backbone' in groups else {}
        if 'logits' in groups:
            taps['logits.0'] = logits
        return TapRecord(taps)

    def _stages(self, model: Any) -> List[nn.Module]:
        """Modules of a bare timm model whose outputs are taps."""
        raise NotImplementedError

    @classmethod
    def _timm_model(cls, model: nn.Module) -> Any:
        return model if isinstance(model, cls.model_class) else getattr(model, 'model', None)

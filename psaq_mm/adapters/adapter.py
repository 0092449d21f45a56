# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the rest of the project asks of a host library."""
import itertools
from contextlib import contextmanager
from typing import Iterator, List, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.prior import AttentionRecord
from psaq_mm.registry import ADAPTERS


class AttentionRecorder:
    """Collects the attention outputs of one forward pass after another."""

    def __init__(self) -> None:
        self.records: List[AttentionRecord] = []

    def take(self) -> List[AttentionRecord]:
        """The records since the last call, in the order of the blocks."""
        records, self.records = self.records, []
        return records


class Adapter:
    """Everything that differs between host libraries.

    One subclass for each, registered with ``@ADAPTERS.register_module()``;
    it holds no state, the model comes with each call. The quantized
    counterparts of the host's own modules live in the same file.
    """

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter serves the model."""
        raise NotImplementedError

    def backbone_name(self, model: nn.Module) -> str:
        """Name of the backbone within the model; empty if it is the model."""
        raise NotImplementedError

    def in_scope(self, model: nn.Module, name: str, scope: str) -> bool:
        """Whether a module belongs to ``scope``, ``backbone`` or ``model``."""
        prefix = self.backbone_name(model)
        return scope == 'model' or not prefix or name == prefix \
            or name.startswith(prefix + '.')

    def is_output_point(self, model: nn.Module, name: str) -> bool:
        """Whether V1 quantizes the output of this module."""
        raise NotImplementedError

    def is_patch_embed(self, model: nn.Module, name: str) -> bool:
        """Whether this module is the projection of the patch embedding."""
        raise NotImplementedError

    def follows_proposals(self, model: nn.Module, name: str) -> bool:
        """Whether a module runs on regions that the model itself proposes, so
        that quantization changes its input and not only its values."""
        return False

    def valid_range(self, model: nn.Module) -> Tuple[Tensor, Tensor]:
        """Smallest and largest pixel after the model's own normalization.

        Returns:
            tuple[Tensor, Tensor]: Shape (1, C, 1, 1) each.
        """
        raise NotImplementedError

    def forward_backbone(self, model: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
        """Feature maps of normalized images of shape (B, C, H, W)."""
        raise NotImplementedError

    def forward_model(self, model: nn.Module, images: Tensor) -> None:
        """Run all of the model, heads included, on normalized images."""
        raise NotImplementedError

    def forward(self, model: nn.Module, images: Tensor, scope: str) -> None:
        """Run what ``scope`` needs."""
        if scope == 'backbone':
            self.forward_backbone(model, images)
        else:
            self.forward_model(model, images)

    @contextmanager
    def record_attention(self, model: nn.Module) -> Iterator[AttentionRecorder]:
        """Within the block, record what each attention block computes."""
        raise NotImplementedError
        yield  # pragma: no cover


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter that serves a model.

    Raises:
        UserError: If there is none, e.g. since the backbone is not Swin.
    """
    ADAPTERS.import_from_location()
    for cls in ADAPTERS.module_dict.values():
        if cls.matches(model):
            return cls()
    backbone = getattr(model, 'backbone', model)
    raise UserError(
        f'model.backbone is {type(backbone).__name__}; expected a Swin Transformer '
        f'(adapters: {", ".join(sorted(ADAPTERS.module_dict))}). Its attention is what '
        'images are synthesized from, so other backbones cannot be quantized without data.')


def module_device(module: nn.Module) -> torch.device:
    """Device of a module's first parameter or buffer."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device('cpu'))

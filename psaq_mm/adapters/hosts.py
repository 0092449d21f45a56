# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which adapter serves a model."""
import importlib
from typing import Optional

from torch import nn

from psaq_mm.errors import UserError
from psaq_mm.registry import ADAPTERS

from .adapter import Adapter

HOSTS = dict(mmdet=('mmdet_swin', ), mmseg=('mmseg_swin', ), timm=('timm_swin', 'timm_vit'))
"""Host library -> the files of this folder that know it."""


def import_hosts(model: nn.Module) -> None:
    """Import what knows the host libraries that a model is made of.

    The others may be absent or too old, and importing them would cost seconds.
    """
    packages = {cls.__module__.split('.')[0] for kind in {type(m) for m in model.modules()}
                for cls in kind.__mro__}
    for host, files in HOSTS.items():
        if host in packages:
            for file in files:
                importlib.import_module(f'psaq_mm.adapters.{file}')


def matching_adapter(model: nn.Module) -> Optional[Adapter]:
    """The adapter that serves a model, if there is one."""
    import_hosts(model)
    for cls in ADAPTERS.module_dict.values():
        if cls.matches(model):
            return cls()
    return None


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter that serves a model.

    Raises:
        UserError: If there is none, e.g. since the backbone is not Swin.
    """
    adapter = matching_adapter(model)
    if adapter is None:
        inside = [name for name, part in model.named_children()
                  if hasattr(part, 'backbone') and matching_adapter(part) is not None]
        if inside:  # a semi-supervised or distilled one
            raise UserError(
                f'model is {type(model).__name__}, whose parts {", ".join(inside)} have a Swin: '
                'inherit the config of one of them, and load its weights from this checkpoint by '
                f'--prefix {inside[-1]} (in Python: model.{inside[-1]})')
        key = next((k for k in ('backbone', 'model') if hasattr(model, k)), '')
        found = getattr(model, key) if key else model
        if 'SwinTransformerV2' in type(found).__name__:
            raise UserError(
                f'model{"." + key if key else ""} is {type(found).__name__}: Swin V2 is not '
                'supported. Its attention takes the cosine of queries and keys, and its branches '
                'end in their norms, which the ops here do not; expected Swin (V1)')
        raise UserError(
            f'model{"." + key if key else ""} is {type(found).__name__}; expected a Swin '
            'Transformer of mmdet, mmseg or timm, or a DeiT of timm. Its attention is what images '
            'are synthesized from, so other backbones cannot be quantized without data.')
    return adapter

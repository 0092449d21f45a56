# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Stops loaders that know nothing of quantization."""
from typing import Any, Tuple

import torch

from psaq_mm.errors import UserError

_MESSAGE = (
    'this is a quantized checkpoint of psaq_mm, and its weights are integers that only psaq_mm '
    'loads. Call psaq_mm.init_model(config, path) or psaq_mm.load(float_model, path);\n'
    "for a runner or a test script, add custom_hooks = [dict(type='psaq_mm."
    "QuantizedCheckpointHook')] to the config.")


class StockLoaderGuard(dict):
    """Stands under ``state_dict`` in a quantized checkpoint and refuses any use.

    mmengine loads with ``strict=False``: given integers under other names, it
    would only print a list of keys and leave the model with random weights.
    This object can be pickled, copied by :mod:`copy` and printed, and nothing
    else.

    Raises:
        UserError: Whatever is done with it. It says what to call instead.
    """

    def __reduce__(self) -> Tuple[Any, ...]:
        return StockLoaderGuard, ()

    def __repr__(self) -> str:
        return 'StockLoaderGuard()'


def _refuse(self: StockLoaderGuard, *args: Any, **kwargs: Any) -> Any:
    raise UserError(_MESSAGE)


for _name in ('__contains__', '__delitem__', '__getitem__', '__ior__', '__iter__', '__len__',
              '__or__', '__reversed__', '__ror__', '__setitem__', 'clear', 'copy', 'get', 'items',
              'keys', 'pop', 'popitem', 'setdefault', 'update', 'values'):
    setattr(StockLoaderGuard, _name, _refuse)

# With it, torch.load(weights_only=True) still reads the file; torch has this since 2.4.
if hasattr(torch.serialization, 'add_safe_globals'):
    torch.serialization.add_safe_globals([StockLoaderGuard])

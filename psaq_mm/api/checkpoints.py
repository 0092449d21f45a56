# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized models to files and back."""
from pathlib import Path
from typing import Any, Mapping, Optional, Union

from torch import nn

from psaq_mm.checkpoint import (
    is_quantized,
    load_checkpoint_file,
    load_quantized_state,
    quantized_checkpoint,
    save_torch,
)
from psaq_mm.errors import UserError


def save(model: nn.Module, path: Union[str, Path], meta: Optional[Mapping[str, Any]] = None,
         **about: Any) -> None:
    """Write a quantized checkpoint, atomically.

    Args:
        model (nn.Module): A calibrated model.
        path (str or Path): The file; an old one stays until the new one is
            complete.
        meta (Mapping, optional): The float checkpoint's ``meta``; its plain
            values are kept. Defaults to None.
        **about: Plain values to record in the manifest, e.g. ``seed=0``.

    Raises:
        UserError: If the model is not calibrated or the file cannot be
            written.
    """
    save_torch(quantized_checkpoint(model, about, meta), path)


def load(model: nn.Module, path: Union[str, Path]) -> nn.Module:
    """Load a quantized checkpoint into a model, in place.

    Args:
        model (nn.Module): The float model of the same config.
        path (str or Path): From :func:`save`. No code of it is run.

    Returns:
        nn.Module: The same model, quantized and switched on.

    Raises:
        UserError: If the file is not a quantized checkpoint, or of another
            model; the first differences are named.
    """
    checkpoint = load_checkpoint_file(str(path))
    if not is_quantized(checkpoint):
        raise UserError(f'{path} is not a quantized checkpoint of psaq_mm (it has no manifest)')
    load_quantized_state(model, checkpoint, str(path))
    return model

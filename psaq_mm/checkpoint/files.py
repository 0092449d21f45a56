# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized models to files and back."""
from pathlib import Path
from typing import Any, Mapping, Optional, Union

from torch import nn

from psaq_mm.errors import UserError
from psaq_mm.ops import ops_to_round
from psaq_mm.recipe.checks import check_model

from .atomic import save_torch
from .manifest import is_quantized
from .quantized_checkpoint import load_quantized_state, quantized_checkpoint
from .safe_load import load_checkpoint_file


def save(model: nn.Module, path: Union[str, Path], meta: Optional[Mapping[str, Any]] = None,
         about: Optional[Mapping[str, Any]] = None) -> None:
    """Write a quantized checkpoint, atomically.

    Args:
        model (nn.Module): From :func:`psaq_mm.quantize`, or a student whose steps are all
            done.
        path (str or Path): The file; an old one stays until the new one is
            complete.
        meta (Mapping, optional): The float checkpoint's ``meta``; its plain
            values are kept. Defaults to None.
        about (Mapping, optional): Plain values to record in the manifest, such as
            ``dict(seed=0)``. Defaults to None.

    Raises:
        UserError: If the model is not calibrated, weights wait to be rounded by GPTQ, or the
            file cannot be written.
    """
    check_model(model)
    waiting = ops_to_round(model)
    if waiting:
        raise UserError(f'weights of {len(waiting)} modules, such as {next(iter(waiting))}, are '
                        'to be rounded by GPTQ and are not: call psaq_mm.round_weights first, or '
                        "prepare the student with quantization.weight.rounding='nearest'")
    save_torch(quantized_checkpoint(model, about, meta), path)


def load(model: nn.Module, path: Union[str, Path]) -> nn.Module:
    """Load a quantized checkpoint into a model, in place.

    Args:
        model (nn.Module): The float model of the same config.
        path (str or Path): From :func:`save`. No code of it is run.

    Returns:
        nn.Module: The same model, quantized.

    Raises:
        UserError: If the file is not a quantized checkpoint, or of another
            model; the first differences are named.
    """
    check_model(model)
    checkpoint = load_checkpoint_file(path)
    if not is_quantized(checkpoint):
        raise UserError(f'{path} is not a quantized checkpoint of psaq_mm (it has no manifest)')
    load_quantized_state(model, checkpoint, str(path))
    return model

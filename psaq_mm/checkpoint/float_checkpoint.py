# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The float weights that a quantization starts from."""
import logging
from typing import Any, Dict, Mapping, Optional

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.adapters import matching_adapter
from psaq_mm.errors import UserError

from .manifest import is_quantized
from .matching import first_differences, require_match
from .safe_load import load_checkpoint_file, meta_of, require_finite
from .weights import WeightChoice, find_weights


def fit_float_state(model: nn.Module, checkpoint: Any, path: str,
                    choice: Optional[WeightChoice] = None) -> Dict[str, Tensor]:
    """The weights of a float checkpoint in the keys of a model, which is not changed.

    Published layouts are recognised and converted, and the log names them.

    Args:
        checkpoint (Any): What :func:`load_checkpoint_file` returned of ``path``.
        choice (WeightChoice, optional): Of several models, or averages. Defaults to None:
            averaged weights where there are any, of one model.

    Returns:
        dict[str, Tensor]: Weights of the model by name. What it computes itself, such as
        index tables, is its own.

    Raises:
        UserError: If there are no weights, their layout is unknown, or they
            are of another model.
    """
    adapter = matching_adapter(model)
    state = find_weights(model, adapter, checkpoint, path, choice)
    if adapter is not None:
        state, layout = adapter.convert_state(model, state)
        if not layout:
            differences = first_differences(model, state, allow_extra=True)
            known = '; '.join(f'{key} ({name})' for name, key in adapter.layouts.items())
            raise UserError(
                f'{path} holds weights in an unknown layout: it begins with {next(iter(state))}; '
                f'expected keys such as {known}.\n'
                f'{differences[:1].upper() + differences[1:]}. Give the checkpoint of the whole '
                'trained model: weights of a backbone alone lack its neck and heads.')
        print_log(f'{path}: layout of the weights: {layout}', logger='current')
    require_match(model, state, path, allow_extra=True)
    extra = first_differences(model, state)
    if extra:
        print_log(f'{path}: keys that the model does not have are ignored; {extra}',
                  logger='current', level=logging.WARNING)
    return with_own_tables(model, state, path)


FLOAT_TABLES = ('project', 'relative_coords_table')
"""Buffers in floating point that models compute themselves: of GFL's heads, of Swin V2."""


def computed_tables(model: nn.Module) -> Dict[str, Tensor]:
    """Buffers that a model computes when it is built, and that no training changes: index
    tables, and what :data:`FLOAT_TABLES` names. Counters are none."""
    return {name: buffer for name, buffer in model.named_buffers()
            if buffer.dim() and (not buffer.is_floating_point()
                                 or name.rpartition('.')[2] in FLOAT_TABLES)}


def with_own_tables(model: nn.Module, state: Mapping[str, Tensor],
                    path: str) -> Dict[str, Tensor]:
    """Replace the tables of a checkpoint that a model computes itself by its own.

    They are the buffers that no training changes, such as ``relative_position_index``; an
    average of several models may have changed them.

    Args:
        model (nn.Module): The float model.
        state (Mapping[str, Tensor]): Weights in its keys.
        path (str): Name of the file, for the warning if one differs.

    Returns:
        dict[str, Tensor]: The weights.
    """
    result = dict(state)
    differing = []
    for name, table in computed_tables(model).items():
        given = state.get(name)
        if given is None:
            continue
        result[name] = table
        if given.shape != table.shape or not torch.allclose(
                given.double(), table.double(), rtol=1e-3, atol=1e-3):
            differing.append(name)
    if differing:
        print_log(f'{path}: {len(differing)} tables that the model computes itself have other '
                  f"values, such as {differing[0]}; the model's own are used. If the checkpoint "
                  'was trained with code of its own, that may number positions in another order.',
                  logger='current', level=logging.WARNING)
    return result


def load_float_weights(model: nn.Module, path: str, trust: bool = False,
                       choice: Optional[WeightChoice] = None) -> Dict[str, Any]:
    """Load a float checkpoint into a model, strictly and without running code.

    Args:
        model (nn.Module): The float model; changed only if all is well.
        path (str): The checkpoint.
        trust (bool): Whether the file may run code when it is unpickled.
            Defaults to False.
        choice (WeightChoice, optional): As of :func:`fit_float_state`. Defaults to None.

    Returns:
        dict: The checkpoint's ``meta`` entry, or an empty dict.

    Raises:
        UserError: If the file is missing, not a checkpoint, quantized already, of another
            model or an unknown layout, or holds values that are not finite.
    """
    return load_float_state(model, load_checkpoint_file(path, trust=trust), path, choice)


def load_float_state(model: nn.Module, checkpoint: Any, path: str,
                     choice: Optional[WeightChoice] = None) -> Dict[str, Any]:
    """As :func:`load_float_weights`, from what was read of the file at ``path``."""
    if is_quantized(checkpoint):
        raise UserError(f'{path} is quantized already; pass the float checkpoint')
    state = fit_float_state(model, checkpoint, path, choice)
    require_finite(state, path)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return meta_of(checkpoint)

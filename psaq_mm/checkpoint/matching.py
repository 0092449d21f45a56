# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Does a state dict fit a model? Where not, the first differences by name."""
from typing import List, Mapping

from torch import Tensor, nn

from psaq_mm.errors import UserError

SHOWN = 3
"""How many differences of a kind a message names."""


def _some(names: List[str]) -> str:
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more


def first_differences(model: nn.Module, state: Mapping[str, Tensor],
                      allow_extra: bool = False) -> str:
    """Name the first keys that keep a state dict from fitting a model.

    Args:
        model (nn.Module): The model.
        state (Mapping[str, Tensor]): The state dict.
        allow_extra (bool): Whether keys that the model does not have are
            fine. Defaults to False.

    Returns:
        str: Empty if it fits.
    """
    own = model.state_dict()
    # Counters of BatchNorm and Swin's index tables are absent from some
    # published files, and the model has them right by construction.
    optional = ('num_batches_tracked', 'relative_position_index')
    missing = [k for k in own if k not in state and not k.endswith(optional)]
    extra = [k for k in state if k not in own and not k.endswith(optional)]
    shapes = [f'{k} ({tuple(state[k].shape)} instead of {tuple(own[k].shape)})'
              for k in own if k in state and state[k].shape != own[k].shape]
    # torch would copy integers into a float weight without a word.
    types = [f'{k} ({state[k].dtype} instead of {own[k].dtype})' for k in own if k in state
             and own[k].is_floating_point() and not state[k].is_floating_point()]
    parts = []
    if missing:
        parts.append(f'missing: {_some(missing)}')
    if shapes:
        parts.append(f'of another shape: {_some(shapes)}')
    if types:
        parts.append(f'of another type: {_some(types)}')
    if extra and not allow_extra:
        parts.append(f'unexpected: {_some(extra)}')
    return '; '.join(parts)


def require_match(model: nn.Module, state: Mapping[str, Tensor], path: str,
                  allow_extra: bool = False) -> None:
    """Raise if a state dict does not fit a model.

    Raises:
        UserError: Naming the file and the first differences.
    """
    differences = first_differences(model, state, allow_extra)
    if differences:
        raise UserError(f'{path} is not a checkpoint of this model. {differences}.\n'
                        'Use the config that the checkpoint was trained or quantized with.')

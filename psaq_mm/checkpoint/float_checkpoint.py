# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The float weights that a quantization starts from."""
import logging
from typing import Any, Dict

from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.adapters import matching_adapter
from psaq_mm.errors import UserError

from .manifest import is_quantized
from .matching import first_differences, require_match
from .safe_load import extract_state_dict, load_checkpoint_file, meta_of, require_finite


def fit_float_state(model: nn.Module, checkpoint: Any, path: str) -> Dict[str, Tensor]:
    """The weights of a float checkpoint in the keys of a model, which is not changed.

    Published layouts are recognised and converted, and the log names them.

    Args:
        checkpoint (Any): What :func:`load_checkpoint_file` returned of ``path``.

    Raises:
        UserError: If there are no weights, their layout is unknown, or they
            are of another model.
    """
    state = extract_state_dict(checkpoint, path)
    adapter = matching_adapter(model)
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
    return state


def load_float_weights(model: nn.Module, path: str, trust: bool = False) -> Dict[str, Any]:
    """Load a float checkpoint into a model, strictly and without running code.

    Args:
        model (nn.Module): The float model; changed only if all is well.
        path (str): The checkpoint.
        trust (bool): Whether the file may run code when it is unpickled.
            Defaults to False.

    Returns:
        dict: The checkpoint's ``meta`` entry, or an empty dict.

    Raises:
        UserError: If the file is missing, not a checkpoint, quantized already, of another
            model or an unknown layout, or holds values that are not finite.
    """
    return load_float_state(model, load_checkpoint_file(path, trust=trust), path)


def load_float_state(model: nn.Module, checkpoint: Any, path: str) -> Dict[str, Any]:
    """As :func:`load_float_weights`, from what was read of the file at ``path``."""
    if is_quantized(checkpoint):
        raise UserError(f'{path} is quantized already; pass the float checkpoint')
    state = fit_float_state(model, checkpoint, path)
    require_finite(state, path)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return meta_of(checkpoint)

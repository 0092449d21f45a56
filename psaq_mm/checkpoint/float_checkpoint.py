# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The float weights that a quantization starts from."""
import logging
from typing import Any, Dict

from mmengine.logging import print_log
from torch import nn

from psaq_mm.errors import UserError

from .manifest import is_quantized
from .matching import first_differences, require_match
from .safe_load import extract_state_dict, load_checkpoint_file, require_finite


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
        UserError: If the file is missing, not a checkpoint, quantized
            already, of another model, or holds values that are not finite.
    """
    checkpoint = load_checkpoint_file(path, trust=trust)
    if is_quantized(checkpoint):
        raise UserError(f'{path} is quantized already; pass the float checkpoint')
    state = extract_state_dict(checkpoint, path)
    require_match(model, state, path, allow_extra=True)
    require_finite(state, path)
    extra = first_differences(model, state)
    if extra:
        print_log(f'{path}: keys that the model does not have are ignored; {extra}',
                  logger='current', level=logging.WARNING)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    return dict(meta) if isinstance(meta, dict) else {}

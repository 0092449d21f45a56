# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Device and type of the weights of a model."""
import itertools

import torch
from torch import nn

from .errors import UserError


def module_device(module: nn.Module) -> torch.device:
    """Device of a module's first parameter or buffer."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device('cpu'))


def require_float32(model: nn.Module) -> None:
    """Raise if a model has weights in half or double precision, in which images and
    ranges cannot be computed.

    Raises:
        UserError: If so.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UserError(f'the model has weights in {parameter.dtype} ({name}), and '
                            'quantization needs torch.float32: call model.float() first')

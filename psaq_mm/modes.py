# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Modes of models that last for a block."""
from contextlib import contextmanager
from typing import Iterator

from torch import nn


@contextmanager
def evaluating(*models: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Within the block models are in evaluation mode, and their parameters need gradients or do
    not; all is as before after it.
    """
    modes = {m: m.training for model in models for m in model.modules()}
    changed = [p for model in models for p in model.parameters()
               if p.is_floating_point() and p.requires_grad != gradients]
    for model in models:
        model.eval()
    for parameter in changed:
        parameter.requires_grad_(gradients)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not gradients)
        for module, mode in modes.items():
            module.training = mode

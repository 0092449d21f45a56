# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far each quantized module is from its float self."""
import math
from contextlib import ExitStack
from typing import Any, Callable, Dict, List

import torch
from torch import Tensor, nn

from psaq_mm.ops import named_quant_ops, quantization_enabled
from psaq_mm.quantization.sqnr import decibel


def _first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else _first_tensor(output[0])


def measure_sqnr(model: nn.Module, images: Tensor,
                 forward: Callable[[Tensor], None]) -> Dict[str, float]:
    """SQNR of the output of each quantized module, in the quantized network.

    Each image runs twice, with quantization off and on; a module's error
    thus includes what the modules before it did.

    Args:
        model (nn.Module): A calibrated model.
        images (Tensor): Normalized images of shape (N, C, H, W).
        forward (Callable): Runs the model on a batch of them.

    Returns:
        dict[str, float]: Module name to decibel, as of :func:`decibel`. Modules whose output has
        another shape in both runs (heads on other proposals) are left out.
    """
    signal: Dict[str, float] = {}
    noise: Dict[str, float] = {}
    reference: Dict[str, List[Tensor]] = {}
    recording = True

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = _first_tensor(output).detach()
            if recording:
                reference.setdefault(name, []).append(value)
                return
            expected = reference[name].pop(0) if reference.get(name) else None
            if expected is None or expected.shape != value.shape:
                signal[name] = math.nan
                return
            signal[name] = signal.get(name, 0.) + float(expected.double().pow(2).sum())
            error = expected.double() - value.double()
            noise[name] = noise.get(name, 0.) + float(error.pow(2).sum())
        return hook

    with torch.no_grad(), ExitStack() as hooks:
        for name, op in named_quant_ops(model):
            hooks.enter_context(op.register_forward_hook(watch(name)))
        for image in images.split(1):
            recording = True
            reference.clear()
            with quantization_enabled(model, False):
                forward(image)
            recording = False
            forward(image)
    return {name: decibel(power, noise[name]) for name, power in signal.items()
            if not math.isnan(power)}

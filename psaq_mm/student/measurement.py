# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far each quantized module is from its float self."""
import math
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Collection, Dict, Iterator, List, Mapping, Optional

import torch
from torch import Tensor, nn

from psaq_mm.adapters import TapRecord
from psaq_mm.ops import named_quant_ops, quantization_enabled
from psaq_mm.quantization.sqnr import decibel

from .sensitivity import tap_error


def _first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else _first_tensor(output[0])


@contextmanager
def quantized_alone(student: nn.Module, teacher: nn.Module,
                    names: Collection[str] = ()) -> Iterator[None]:
    """Within the block a student computes what its teacher does, but for some of its ops.

    All other quantizers are off, and all other parameters are the teacher's: those of the
    student may be rounded or learned.

    Args:
        student (nn.Module): A calibrated model.
        teacher (nn.Module): The float model that it is a copy of, on the same device.
        names (Collection[str]): Names of the ops that stay quantized. Defaults to none.
    """
    floats = dict(teacher.named_modules())
    chosen: List[Any] = [student.get_submodule(name) for name in names]
    kept = [(q, q.enabled) for op in chosen for q in op.quantizers.values()]
    before = []
    try:
        with quantization_enabled(student, False):
            for quantizer, enabled in kept:
                quantizer.enabled = enabled
            for name, module in student.named_modules():
                if module not in chosen and module._parameters:
                    before.append((module, dict(module._parameters)))
                    module._parameters.update(floats[name]._parameters)
            yield
    finally:
        for module, parameters in before:
            module._parameters.update(parameters)


def measure_each_alone(student: nn.Module, teacher: nn.Module, images: Tensor,
                       groups: Mapping[str, Collection[str]],
                       forward: Callable[[nn.Module, Tensor, Optional[List[Tensor]]], TapRecord]
                       ) -> Dict[str, float]:
    """What the taps of a model lose when one group of its ops alone is quantized.

    Each image runs once for the teacher and once for each group.

    Args:
        student (nn.Module): A calibrated model; it is as before afterwards.
        teacher (nn.Module): The float model that it is a copy of.
        images (Tensor): Normalized images of shape (N, C, H, W).
        groups (Mapping[str, Collection[str]]): Name of each group to the names of its ops.
        forward (Callable): Runs one of the models on an image of shape (1, C, H, W), on the
            regions of the teacher where there are any.

    Returns:
        dict[str, float]: Name of each group to its relative error: the root of the mean of
        :func:`tap_error` over the images. 0 where nothing is lost.
    """
    powers = dict.fromkeys(groups, 0.)
    with torch.no_grad():
        for image in images.split(1):
            expected = forward(teacher, image, None)
            for group, names in groups.items():
                with quantized_alone(student, teacher, names):
                    found = forward(student, image, expected.regions)
                powers[group] += float(tap_error(expected.taps, found.taps).sum())
    return {group: math.sqrt(power / len(images)) for group, power in powers.items()}


def measure_sqnr(model: nn.Module, images: Tensor, forward: Callable[[Tensor], None],
                 teacher: Optional[nn.Module] = None) -> Dict[str, float]:
    """SQNR of the output of each quantized module, in the quantized network.

    Each image runs twice, with quantization off and on; a module's error
    thus includes what the modules before it did.

    Args:
        model (nn.Module): A calibrated model.
        images (Tensor): Normalized images of shape (N, C, H, W).
        forward (Callable): Runs the model on a batch of them.
        teacher (nn.Module, optional): The float model that it is a copy of. Defaults to None:
            the model with its quantizers off, whose weights GPTQ may have rounded.

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
            with quantization_enabled(model, False) if teacher is None \
                    else quantized_alone(model, teacher):
                forward(image)
            recording = False
            forward(image)
    return {name: decibel(power, noise[name]) for name, power in signal.items()
            if not math.isnan(power)}

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The verbs: what a script calls, and what the tools themselves call."""
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Union

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.adapter import Adapter, module_device
from psaq_mm.checkpoint import (
    is_quantized,
    load_checkpoint_file,
    prepare_for_loading,
    quantized_checkpoint,
    require_finite,
    save_torch,
)
from psaq_mm.errors import UserError
from psaq_mm.evolution import CalibrationSettings, SynthesisSettings, Synthesizer, calibrate_ranges
from psaq_mm.ops import apply_plan, left_float, named_quant_ops, plan_quantization, unwrap
from psaq_mm.prior import TeacherRecord
from psaq_mm.quantization.settings import QuantizationSettings

__all__ = ['calibrate', 'check_synthesis', 'load', 'quantize', 'save', 'scope_of', 'synthesize',
           'synthesizer', 'unwrap']


def quantize(model: nn.Module, **settings: Any) -> nn.Module:
    """Replace modules of a float model by their quantized ops, in place.

    Quantization stays off, and the model computes what it did, until
    :func:`calibrate` has set the ranges of the activations.

    Args:
        model (nn.Module): A detector or segmentor with a Swin backbone, a
            Swin or ViT of timm, or the backbone alone.
        **settings: Of :class:`QuantizationSettings`: ``weight``,
            ``activation``, ``placement``, ``scope``, ``include``, ...

    Returns:
        nn.Module: The same model.

    Raises:
        UserError: If a setting is wrong, a weight is not finite or the model
            cannot be quantized; the model is then unchanged.
    """
    chosen = QuantizationSettings.from_dict(settings)
    adapter = find_adapter(model)
    plan = plan_quantization(model, chosen, adapter)
    remaining = left_float(model, plan, adapter, chosen.scope)
    print_log(f'quantizing {len(plan)} modules in scope {chosen.scope!r}; weights left float: '
              f'{", ".join(remaining) or "none"}', logger='current')
    require_finite({f'{name}.weight': model.get_submodule(name).get_parameter('weight')
                    for name, specs in plan.items() if 'weight' in specs}, 'the model')
    try:
        apply_plan(model, plan, chosen.learnable_ranges)
    except BaseException:
        unwrap(model)
        raise
    return model


def check_synthesis(model: nn.Module, settings: SynthesisSettings) -> None:
    """Raise if images cannot be made from a model so, before any step.

    Args:
        model (nn.Module): The float model.
        settings (SynthesisSettings): The ``synthesis`` section.

    Raises:
        UserError: If the model takes no images of that size, or a term needs
            BatchNorm statistics that the model does not have.
    """
    adapter = find_adapter(model)
    adapter.check_image_size(model, settings.size)
    for name, term in settings.build_priors().items():
        if term.needs_batch_norm and not adapter.batch_norms(model):
            raise UserError(f'synthesis.priors.{name} needs BatchNorm statistics, and this model '
                            f'has none; drop it by synthesis.priors.{name}=None')


@contextmanager
def synthesizer(model: nn.Module, seed: int = 0, **settings: Any) -> Iterator[Synthesizer]:
    """A :class:`Synthesizer` on a float model, to be stepped within the block.

    The model is in evaluation mode and its parameters need no gradient
    inside; both are as before after it.

    Args:
        model (nn.Module): The float model.
        seed (int): Seed of all randomness. Defaults to 0.
        **settings: Of :class:`SynthesisSettings`.
    """
    chosen = SynthesisSettings.from_dict(settings)
    adapter = find_adapter(model)
    lower, upper = adapter.valid_range(model)
    training = {m: m.training for m in model.modules()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    check_synthesis(model, chosen)
    heads = any(term.needs_batch_norm for term in chosen.build_priors().values())
    with adapter.record_attention(model) as attention, \
            adapter.record_batch_norm(model, heads) as batch_norms:

        def teacher(images: Tensor) -> TeacherRecord:
            attention.take()
            batch_norms.take()
            if heads:
                adapter.forward_norms(model, images)
            else:
                adapter.forward_backbone(model, images)
            return TeacherRecord(attention.take(), batch_norms.take())

        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield Synthesizer(chosen, teacher, lower, upper, seed, module_device(model))
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, mode in training.items():
                module.training = mode


def synthesize(model: nn.Module, seed: int = 0,
               progress: Optional[Callable[[Dict[str, float]], None]] = None,
               **settings: Any) -> Tensor:
    """Make images from a float model alone.

    Args:
        model (nn.Module): The float model.
        seed (int): Seed of all randomness. Defaults to 0.
        progress (Callable, optional): Called with the losses of each step.
            Defaults to None.
        **settings: Of :class:`SynthesisSettings`.

    Returns:
        Tensor: Normalized images of shape (num_images, C, H, W), on the CPU.

    Raises:
        UserError: If a setting is wrong or the backbone is not one of those.
        FloatingPointError: If a loss is not finite.
    """
    with synthesizer(model, seed, **settings) as images:
        while not images.done:
            losses = images.step()
            if progress is not None:
                progress(losses)
        return images.images


def scope_of(model: nn.Module, adapter: Adapter) -> str:
    """``model`` if a quantized op lies outside of the backbone, else ``backbone``."""
    inside = all(adapter.in_scope(model, name, 'backbone') for name, _ in named_quant_ops(model))
    return 'backbone' if inside else 'model'


def calibrate(model: nn.Module, images: Tensor,
              progress: Optional[Callable[[int], None]] = None, **settings: Any) -> nn.Module:
    """Set the ranges of a quantized model on images, and switch it on.

    Args:
        model (nn.Module): From :func:`quantize`.
        images (Tensor): Normalized images of shape (N, C, H, W).
        progress (Callable, optional): Called with the number of images of
            each finished batch. Defaults to None.
        **settings: Of :class:`CalibrationSettings`.

    Returns:
        nn.Module: The same model.

    Raises:
        UserError: If nothing is quantized, there are no images, or a
            quantizer saw no values or values that are not finite.
    """
    chosen = CalibrationSettings.from_dict(settings)
    if next(named_quant_ops(model), None) is None:
        raise UserError('the model has no quantized modules: call psaq_mm.quantize first')
    if not isinstance(images, Tensor) or not images.is_floating_point() \
            or images.dim() != 4 or len(images) == 0:
        got = f'{images.dtype} {tuple(images.shape)}' if isinstance(images, Tensor) \
            else type(images).__name__
        raise UserError('calibration needs float images of shape (N, C, H, W) with N of at '
                        f'least 1, got {got}')
    adapter = find_adapter(model)
    scope, device = scope_of(model, adapter), module_device(model)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        calibrate_ranges(model, images,
                         lambda batch: adapter.forward(model, batch.to(device), scope),
                         chosen.batch_size, progress)
    except ValueError as error:
        raise UserError(f'calibration failed: {error}') from error
    finally:
        for module, mode in training.items():
            module.training = mode
    return model


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
    state = prepare_for_loading(model, checkpoint, str(path))
    with torch.no_grad():
        model.load_state_dict(state, strict=False)  # checked to match already
    return model

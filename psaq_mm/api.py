# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The verbs: what a script calls, and what the tools themselves call."""
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.adapters import TapRecord, find_adapter
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
from psaq_mm.evolution import (
    CalibrationSettings,
    EvolutionSettings,
    Evolver,
    Student,
    SynthesisSettings,
    Synthesizer,
    calibrate_ranges,
    carry_ranges_over,
    mosaics,
)
from psaq_mm.ops import apply_plan, left_float, named_quant_ops, plan_quantization, unwrap
from psaq_mm.prior import TeacherRecord
from psaq_mm.quantization.settings import QuantizationSettings

__all__ = ['calibrate', 'check_calibration', 'check_evolution', 'check_synthesis', 'evolve',
           'evolver', 'load', 'quantize', 'refit', 'save', 'scope_of', 'synthesize',
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


def check_evolution(model: nn.Module, settings: EvolutionSettings) -> None:
    """Raise if teacher and student cannot be compared so, before any step.

    Args:
        model (nn.Module): The float model.
        settings (EvolutionSettings): The ``evolution`` section.

    Raises:
        UserError: If the model has none of the taps.
    """
    if settings.rounds:
        settings.chosen_groups(find_adapter(model).tap_groups(model))


def check_calibration(model: nn.Module, settings: CalibrationSettings) -> None:
    """Raise if a model takes no images of the size for the last ranges.

    Args:
        model (nn.Module): The float model.
        settings (CalibrationSettings): The ``calibration`` section.

    Raises:
        UserError: If so.
    """
    if settings.size is None:
        return
    try:
        find_adapter(model).check_image_size(model, settings.size)
    except UserError as error:
        raise UserError(str(error).replace('synthesis.', 'calibration.')) from error


@contextmanager
def _frozen(*models: nn.Module) -> Iterator[None]:
    """Within the block models are in evaluation mode and need no gradient."""
    modes = {m: m.training for model in models for m in model.modules()}
    trainable = [p for model in models for p in model.parameters() if p.requires_grad]
    for model in models:
        model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _teacher(model: nn.Module, settings: SynthesisSettings,
             groups: Tuple[str, ...] = ()) -> Iterator[
                 Callable[[Tensor], Tuple[TeacherRecord, TapRecord]]]:
    """Within the block, a function that runs a float model on images and gives
    what the prior and the taps need."""
    adapter = find_adapter(model)
    heads = any(term.needs_batch_norm for term in settings.build_priors().values())
    with adapter.record_attention(model) as attention, \
            adapter.record_batch_norm(model, heads) as batch_norms:

        def run(images: Tensor) -> Tuple[TeacherRecord, TapRecord]:
            attention.take()
            batch_norms.take()
            taps = TapRecord({})
            if groups:
                taps = adapter.forward_taps(model, images, groups)
            if groups and heads:  # the taps' pass ran some heads, not all
                attention.take()
                batch_norms.take()
            if heads:
                adapter.forward_norms(model, images)
            elif not groups:
                adapter.forward_backbone(model, images)
            return TeacherRecord(attention.take(), batch_norms.take()), taps

        yield run


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
    lower, upper = find_adapter(model).valid_range(model)
    check_synthesis(model, chosen)
    with _frozen(model), _teacher(model, chosen) as teacher:
        yield Synthesizer(chosen, lambda images: teacher(images)[0], lower, upper, seed,
                          module_device(model))


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


@contextmanager
def evolver(student: nn.Module, teacher: nn.Module, images: Tensor, seed: int = 0,
            synthesis: Optional[Mapping[str, Any]] = None,
            **settings: Any) -> Iterator[Evolver]:
    """An :class:`Evolver`, to be stepped within the block.

    Both models are in evaluation mode inside, and as before after it.

    Args:
        student (nn.Module): From :func:`quantize` and :func:`calibrate`.
        teacher (nn.Module): The float model.
        images (Tensor): From :func:`synthesize`, shape (N, C, H, W).
        seed (int): Seed of all randomness. Defaults to 0.
        synthesis (Mapping, optional): The ``synthesis`` section: the prior of
            the images. Defaults to None: its defaults.
        **settings: Of :class:`EvolutionSettings`.

    Raises:
        UserError: If a setting is wrong, or the student is not calibrated.
    """
    chosen = EvolutionSettings.from_dict(settings)
    prior = SynthesisSettings.from_dict(synthesis)
    if not any(quantizer.enabled for _, op in named_quant_ops(student)
               for quantizer in op.quantizers.values()):
        raise UserError('the student is not calibrated: call psaq_mm.quantize and '
                        'psaq_mm.calibrate first')
    adapter = find_adapter(student)
    groups = chosen.chosen_groups(adapter.tap_groups(student))
    lower, upper = adapter.valid_range(teacher)

    def forward(batch: Tensor, regions: Optional[List[Tensor]]) -> TapRecord:
        return adapter.forward_taps(student, batch, groups, regions)

    with _frozen(teacher, student), _teacher(teacher, prior, groups) as run:
        game = Evolver(chosen, prior, run, Student(student, forward, chosen), images,
                       lower, upper, seed, module_device(teacher))
        try:
            yield game
        finally:
            game.student.require_grad(False)


def evolve(student: nn.Module, teacher: nn.Module, images: Tensor, seed: int = 0,
           synthesis: Optional[Mapping[str, Any]] = None,
           progress: Optional[Callable[[Dict[str, float]], None]] = None,
           **settings: Any) -> nn.Module:
    """Let images and student evolve against each other, in place.

    Args:
        student (nn.Module): From :func:`quantize` and :func:`calibrate`.
        teacher (nn.Module): The float model.
        images (Tensor): From :func:`synthesize`, shape (N, C, H, W).
        seed (int): Seed of all randomness. Defaults to 0.
        synthesis (Mapping, optional): The ``synthesis`` section. Defaults to
            None.
        progress (Callable, optional): Called with the losses of each step.
            Defaults to None.
        **settings: Of :class:`EvolutionSettings`, e.g. ``rounds=10``.

    Returns:
        nn.Module: The student.

    Raises:
        UserError: If a setting is wrong or the student is not calibrated.
        FloatingPointError: If a loss is not finite; the student is then that
            of the step before.
    """
    with evolver(student, teacher, images, seed, synthesis, **settings) as game:
        while not game.done:
            losses = game.step()
            if progress is not None:
                progress(losses)
        game.finish()
    return student


def refit(model: nn.Module, images: Tensor, size: Tuple[int, int],
          learnt: bool = False, **settings: Any) -> nn.Module:
    """Set the ranges once more, for images of another size.

    Args:
        model (nn.Module): A calibrated model.
        images (Tensor): Those it was calibrated or evolved on.
        size (tuple[int, int]): Height and width in pixels.
        learnt (bool): Whether ranges of activations were learnt; they are
            then scaled as the range rule's are, not replaced. Defaults to
            False.
        **settings: Of :class:`CalibrationSettings`.

    Returns:
        nn.Module: The same model.
    """
    chosen = CalibrationSettings.from_dict(settings)
    others = mosaics(images, size)
    if learnt and others is images:
        return model
    adapter = find_adapter(model)
    scope, device = scope_of(model, adapter), module_device(model)
    share = others.shape[-2] * others.shape[-1] / (images.shape[-2] * images.shape[-1])
    if not learnt:
        return calibrate(model, others, batch_size=max(1, int(chosen.batch_size / share)))
    with _frozen(model):
        carry_ranges_over(model, images, others,
                          lambda batch: adapter.forward(model, batch.to(device), scope),
                          chosen.batch_size)
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

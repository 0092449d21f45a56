# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A quantized model as a checkpoint, and back.

In the state dict, ``<module>.weight`` of a quantized module is replaced by
``<module>.weight_integers``: the integers themselves, in int8, or fewer bits without
gaps (:mod:`psaq_mm.quantization.packing`). Ranges are ``<module>.quantizers.<role>.scale`` and
``.zero_point``. The key differs on purpose: torch would copy int8 values into
a float weight without a word.

The state dict stands under a key of ours: see ``stock_loader_guard.py``.
"""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Mapping, Optional

import torch
from torch import Tensor, nn

from psaq_mm.adapters import import_hosts
from psaq_mm.errors import UserError
from psaq_mm.ops import (
    QuantOp,
    apply_plan,
    named_quant_ops,
    named_quantizers,
    named_rotations,
    set_quantization,
    unwrap,
    without_notes,
)
from psaq_mm.ops.op import SETTLED
from psaq_mm.quantization import (
    Quantizer,
    dequantize,
    pack_integers,
    unpack_integers,
)
from psaq_mm.quantization.packing import old_slot_bits, packed_bytes
from psaq_mm.quantization.quantizer import restoring_ranges
from psaq_mm.quantization.ranges import flaw_of_range

from .manifest import (
    MANIFEST_KEY,
    STATE_KEY,
    build_manifest,
    plan_of_manifest,
    read_manifest,
)
from .matching import require_match, require_same_modules
from .plain import plain
from .safe_load import require_finite
from .stock_loader_guard import StockLoaderGuard


def quantized_checkpoint(model: nn.Module, about: Optional[Mapping[str, Any]] = None,
                         meta: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """The content of a quantized checkpoint of a calibrated model.

    Args:
        about (Mapping, optional): Further entries of the manifest. Defaults to None.
        meta (Mapping, optional): The float checkpoint's ``meta``; its plain
            values are kept, such as ``dataset_meta``. Defaults to None.

    Returns:
        dict: ``meta``, the manifest, the weights and, under ``state_dict``,
        what stops other loaders; where torch has ``add_safe_globals``,
        ``torch.load(weights_only=True)`` loads it.

    Raises:
        UserError: If nothing is quantized or a range is not set or not valid.
    """
    ops = dict(named_quant_ops(model))
    if not ops:
        raise UserError('the model has no quantized modules: call psaq_mm.quantize first')
    state = {k: v.detach().cpu() for k, v in without_notes(model.state_dict()).items()}
    manifest = build_manifest(model, plain(about or {}))
    for name, op in ops.items():
        for role, quantizer in op.quantizers.items():
            if not quantizer.calibrated:
                raise UserError(f'{name} ({role}) has no range: call psaq_mm.calibrate first')
            flaw = _flaw_of_range(state, op, name, role)
            if flaw:
                raise UserError(f'the model cannot be saved: {flaw}; calibrate it again')
        weight = op.weight_quantizer
        if weight is not None:
            with torch.no_grad():
                integers = weight.to_integers(op.weight).cpu()
            # unsigned integers of an asymmetric range are stored around zero
            integers = integers - _offset(weight)
            del state[f'{name}.weight']
            state[f'{name}.weight_integers'] = pack_integers(integers, weight.spec.bits)
    for second in _second_names(model):
        for key in [k for k in state if k.startswith(second + '.')]:
            del state[key]
    return {'meta': plain(meta or {}), **guarded(state, manifest)}


def guarded(state: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Dict[str, Any]:
    """The entries of a checkpoint that say what is quantized, with what weights: a manifest, and
    weights as :func:`prepare_for_loading` takes them. ``state_dict`` stops other loaders.
    """
    return {'state_dict': StockLoaderGuard(), STATE_KEY: state, MANIFEST_KEY: manifest}


def _second_names(model: nn.Module) -> Dict[str, str]:
    """Further names of ops that a model holds twice, each with the first."""
    first: Dict[nn.Module, str] = {}
    second = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantOp) and first.setdefault(module, name) != name:
            second[name] = first[module]
    return second


def _offset(quantizer: Quantizer) -> int:
    return 0 if quantizer.spec.symmetric else 2**(quantizer.spec.bits - 1)


def prepare_for_loading(model: nn.Module, checkpoint: Mapping[str, Any],
                        path: str) -> Dict[str, Tensor]:
    """Fit a model with the quantized ops of a checkpoint, and unpack it.

    Args:
        model (nn.Module): The float model (its ops are added, in place), or
            one that has the same ops already.
        checkpoint (Mapping): What :func:`quantized_checkpoint` made, in this
            or an earlier version; weights may also be float, as training
            leaves them.
        path (str): Its name, for messages.

    Returns:
        dict[str, Tensor]: A float state dict that fits the model exactly;
        weights are the dequantized integers. Quantization is on.

    Raises:
        UserError: If the checkpoint is damaged or of another model; the
            first differences are named, and the model is left as it was.
    """
    try:
        manifest = read_manifest(checkpoint)
        plan = plan_of_manifest(manifest)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    key = 'state_dict' if manifest['format_version'] == 1 else STATE_KEY
    packed = checkpoint.get(key)
    if not isinstance(packed, Mapping) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in packed.items()):
        raise _damaged(path, f'its {key} does not hold tensors by name')
    import_hosts(model)  # their ops
    require_same_modules(model, manifest, plan, path)
    with _undone_on_failure(model):
        if next(named_quant_ops(model), None) is None:
            apply_plan(model, plan)
        state = _unpack(model, without_notes(packed), path, manifest['format_version'] < 3)
        for name, role, quantizer in named_quantizers(model):
            quantizer.reshape_like(state, f'{name}.quantizers.{role}.')
        for name, rotation in named_rotations(model):
            rotation.reshape_like(state, f'{name}.rotation.')
        require_match(model, state, path)
        require_finite(state, path)
    for name, op in named_quant_ops(model):
        if op.awaits_gptq:  # it was there before; what is loaded is rounded already
            state[f'{name}.{SETTLED}'] = torch.tensor(True)
    set_quantization(model, True)
    return state


def load_quantized_state(model: nn.Module, checkpoint: Mapping[str, Any], path: str) -> None:
    """Load a quantized checkpoint in place, by the rules of :func:`prepare_for_loading`."""
    state = prepare_for_loading(model, checkpoint, path)
    with torch.no_grad():
        model.load_state_dict(state, strict=False)  # checked to match already


def _damaged(path: str, what: str) -> UserError:
    return UserError(f'{path} is damaged: {what}; quantize again')


@contextmanager
def _undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Within the block, ops may be added, or those that are there reshaped."""
    was_quantized = next(named_quant_ops(model), None) is not None
    means = {rotation: rotation.mean for _, rotation in named_rotations(model)}
    with restoring_ranges(q for _, _, q in named_quantizers(model)):
        try:
            yield
        except BaseException:
            for _, rotation in named_rotations(model):
                rotation.mean = means.get(rotation, torch.empty(0))
            if not was_quantized:
                unwrap(model)
            raise


def _unpack(model: nn.Module, packed: Mapping[str, Tensor], path: str,
            with_gaps: bool) -> Dict[str, Tensor]:
    """The state dict with float weights in the place of integers, which may be stored as in
    checkpoints up to format version 2."""
    state = dict(packed)
    for name, op in named_quant_ops(model):
        for role in op.quantizers:
            flaw = _flaw_of_range(state, op, name, role)
            if flaw:
                raise _damaged(path, flaw)
        weight = op.weight_quantizer
        key = f'{name}.weight_integers'
        if weight is None or key not in state and f'{name}.weight' in state:
            continue
        if key not in state:
            raise _damaged(path, f'{key} is missing')
        try:
            bits = weight.spec.bits
            integers = unpack_integers(state.pop(key), bits, op.weight.shape,
                                       old_slot_bits(bits) if with_gaps else None)
        except ValueError as error:
            raise _damaged(path, f'{key}: {error}') from error
        scale = state[f'{name}.quantizers.weight.scale']
        zero_point = state.get(f'{name}.quantizers.weight.zero_point', torch.zeros_like(scale))
        values = integers.to(torch.int32) + _offset(weight)
        state[f'{name}.weight'] = dequantize(values, scale, zero_point, weight.axis)
    for name, rotation in named_rotations(model):
        mean = state.get(f'{name}.rotation.mean')
        if mean is None or mean.shape != rotation.signs.shape:
            raise _damaged(path, f'{name}.rotation.mean is not one value for each channel')
    for second, name in _second_names(model).items():
        for key in [k for k in state if k.startswith(name + '.')]:
            state[second + key[len(name):]] = state[key]
    return state


def _flaw_of_range(state: Mapping[str, Tensor], op: QuantOp, name: str, role: str) -> str:
    """What is wrong with a scale or zero point; how many channels an activation
    has is not known before it is seen."""
    quantizer = op.quantizers[role]
    channels = op.weight.shape[op.roles['weight']] if role == 'weight' else None
    scale = None
    for part in ('scale', 'zero_point'):
        key = f'{name}.quantizers.{role}.{part}'
        value = state.get(key)
        if value is None:
            if part == 'scale' or not quantizer.spec.symmetric:
                return f'{key} is missing'
            continue
        if scale is None:
            scale = value
        if quantizer.axis is None:
            fits = value.dim() == 0
        else:
            fits = value.dim() == 1 and len(value) > 0 and channels in (None, len(value))
        if not fits or value.shape != scale.shape:
            return f'{key} has shape {tuple(value.shape)}'
        flaw = flaw_of_range(part, value, quantizer.spec)
        if flaw:
            return f'{key} {flaw}'
    return ''


def size_of_quantized(model: nn.Module) -> Dict[str, int]:
    """Bytes of the quantized part, float and as stored.

    Returns:
        dict: ``float_bytes``: the float32 weights of quantized modules;
        ``stored_bytes``: their packed integers, and every scale and zero
        point of the model, those of activations included.
    """
    float_bytes = stored_bytes = 0
    for _, op in named_quant_ops(model):
        if op.weight_quantizer is not None:
            float_bytes += 4 * op.weight.numel()
            stored_bytes += packed_bytes(op.weight.numel(), op.weight_quantizer.spec.bits)
        for quantizer in op.quantizers.values():
            stored_bytes += sum(4 * value.numel() for value in quantizer.state_dict().values()
                                if value.is_floating_point())
    return dict(float_bytes=float_bytes, stored_bytes=stored_bytes)

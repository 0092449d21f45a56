# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A quantized model as a checkpoint, and back.

In the state dict, ``<module>.weight`` of a quantized module is replaced by
``<module>.weight_integers``: the integers themselves, in int8, or two 4-bit or
four 2-bit values a byte. Ranges are ``<module>.quantizers.<role>.scale`` and
``.zero_point``. The key differs on purpose: torch would copy int8 values into
a float weight without a word.
"""
from typing import Any, Dict, List, Mapping, Optional

import torch
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp, apply_plan, named_quant_ops, op_for, set_quantization
from psaq_mm.quantization import Quantizer, dequantize, pack_integers, unpack_integers

from .manifest import MANIFEST_KEY, build_manifest, plan_of_manifest, read_manifest
from .matching import require_match

_PLAIN = (str, int, float, bool, type(None))


def plain(value: Any) -> Any:
    """A copy of nested dicts and lists without what is not a plain value.

    What ``torch.load(weights_only=True)`` reads: str, numbers, None, lists
    and dicts of them. Tuples become lists, anything else is dropped.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items() if isinstance(k, (str, int))}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None


def quantized_checkpoint(model: nn.Module, about: Optional[Mapping[str, Any]] = None,
                         meta: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """The content of a quantized checkpoint.

    Args:
        model (nn.Module): A calibrated model with quantized ops.
        about (Mapping, optional): Further entries of the manifest. Defaults
            to None.
        meta (Mapping, optional): The float checkpoint's ``meta``; its plain
            values are kept, such as ``dataset_meta``. Defaults to None.

    Returns:
        dict: ``meta``, ``state_dict`` and the manifest; it can be loaded
        with ``torch.load(weights_only=True)``.

    Raises:
        UserError: If nothing is quantized or a range is not set.
    """
    ops = dict(named_quant_ops(model))
    if not ops:
        raise UserError('the model has no quantized modules: call psaq_mm.quantize first')
    state: Dict[str, Tensor] = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    manifest = build_manifest(model, plain(about or {}))
    for name, op in ops.items():
        for role, quantizer in op.quantizers.items():
            assert isinstance(quantizer, Quantizer)
            if not quantizer.calibrated:
                raise UserError(f'{name} ({role}) has no range: call psaq_mm.calibrate first')
        weight = op.weight_quantizer
        if weight is not None:
            with torch.no_grad():
                integers = weight.to_integers(op.weight).cpu()
            # unsigned integers of an asymmetric range are stored around zero
            integers = integers - _offset(weight)
            del state[f'{name}.weight']
            state[f'{name}.weight_integers'] = pack_integers(integers, weight.spec.bits)
    return {'meta': plain(meta or {}), 'state_dict': state, MANIFEST_KEY: manifest}


def _offset(quantizer: Quantizer) -> int:
    return 0 if quantizer.spec.symmetric else 2**(quantizer.spec.bits - 1)


def prepare_for_loading(model: nn.Module, checkpoint: Mapping[str, Any],
                        path: str) -> Dict[str, Tensor]:
    """Fit a model with the quantized ops of a checkpoint, and unpack it.

    Args:
        model (nn.Module): The float model (its ops are added, in place), or
            one that has the same ops already.
        checkpoint (Mapping): What :func:`quantized_checkpoint` made.
        path (str): Its name, for messages.

    Returns:
        dict[str, Tensor]: A float state dict that fits the model exactly;
        weights are the dequantized integers. Quantization is on.

    Raises:
        UserError: If the checkpoint is damaged or of another model; the
            first differences are named, and the model is left as it was.
    """
    manifest = read_manifest(checkpoint)
    plan = plan_of_manifest(manifest)
    modules = dict(model.named_modules())
    present = dict(named_quant_ops(model))
    wrong: List[str] = []
    for name, entry in manifest['modules'].items():
        module = modules.get(name)
        op = type(module) if isinstance(module, QuantOp) else (
            None if module is None else op_for(module))
        if module is None:
            wrong.append(f'{name} (absent)')
        elif op is None or op.__name__ != entry['op']:
            wrong.append(f'{name} (is {type(module).__name__}, the checkpoint has {entry["op"]})')
        elif 'weight_shape' in entry and list(module.weight.shape) != entry['weight_shape']:
            wrong.append(f'{name}.weight (has shape {list(module.weight.shape)}, the checkpoint '
                         f'{entry["weight_shape"]})')
    if present and set(present) != set(plan):
        wrong += [f'{n} (quantized on one side only)' for n in sorted(set(present) ^ set(plan))]
    if wrong:
        more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise UserError(f'{path} is not a quantized checkpoint of this model. Different: '
                        f'{", ".join(wrong[:3])}{more}.\n'
                        'Use the config that the checkpoint was quantized with.')
    if not present:
        apply_plan(model, plan, bool(manifest.get('learnable_ranges', False)))
    try:
        return _unpack_into(model, checkpoint, manifest, path)
    except Exception:
        if not present:
            from psaq_mm.ops import unwrap
            unwrap(model)
        raise


def _unpack_into(model: nn.Module, checkpoint: Mapping[str, Any], manifest: Mapping[str, Any],
                 path: str) -> Dict[str, Tensor]:
    state: Dict[str, Tensor] = dict(checkpoint['state_dict'])
    for name, op in named_quant_ops(model):
        weight = op.weight_quantizer
        if weight is None:
            continue
        key, prefix = f'{name}.weight_integers', f'{name}.quantizers.weight.'
        if key not in state or prefix + 'scale' not in state:
            raise UserError(f'{path} is damaged: {key} or its scale is missing; quantize again')
        scale = state[prefix + 'scale']
        zero_point = state.get(prefix + 'zero_point', torch.zeros_like(scale))
        shape = manifest['modules'][name]['weight_shape']
        try:
            integers = unpack_integers(state.pop(key), weight.spec.bits, tuple(shape))
        except ValueError as error:
            raise UserError(f'{path} is damaged: {key}: {error}; quantize again') from error
        values = integers.to(torch.int32) + _offset(weight)
        state[f'{name}.weight'] = dequantize(values, scale, zero_point, weight.axis)
    _shape_ranges(model, state)
    require_match(model, state, path)
    set_quantization(model, True)
    return state


def _shape_ranges(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give each range the shape that the checkpoint has for it."""
    for name, op in named_quant_ops(model):
        for role, quantizer in op.quantizers.items():
            assert isinstance(quantizer, Quantizer)
            quantizer.reshape_like(state, f'{name}.quantizers.{role}.')


def size_of_quantized(model: nn.Module) -> Dict[str, int]:
    """Bytes of the quantized part, float and as stored.

    Returns:
        dict: ``float_bytes``: the float32 weights of quantized modules;
        ``stored_bytes``: their packed integers, and every scale and zero
        point of the model, those of activations included.
    """
    float_bytes = stored_bytes = 0
    state = quantized_checkpoint(model)['state_dict']
    for name, op in named_quant_ops(model):
        if op.weight_quantizer is not None:
            float_bytes += 4 * op.weight.numel()
        for key in state:
            if key == f'{name}.weight_integers' or key.startswith(f'{name}.quantizers.'):
                stored_bytes += state[key].numel() * state[key].element_size()
    return dict(float_bytes=float_bytes, stored_bytes=stored_bytes)

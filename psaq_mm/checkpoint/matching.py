# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Does a checkpoint fit a model? Where not, the first differences by name."""
import re
from typing import Any, Iterator, List, Mapping, Optional

from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp, named_quant_ops, op_for, without_notes
from psaq_mm.ops.plan import Plan
from psaq_mm.quantization import QuantSpec

SHOWN = 3
"""How many differences of a kind a message names."""


def _some(names: List[str]) -> str:
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more


def first_differences(model: nn.Module, state: Mapping[str, Tensor],
                      allow_extra: bool = False) -> str:
    """Name the first keys that keep a state dict from fitting a model; empty if it fits.

    Args:
        allow_extra (bool): Whether keys that the model does not have are
            fine, but for those of further blocks: every other weight of a
            deeper model may fit. Defaults to False.
    """
    own = without_notes(model.state_dict())
    # Counters of BatchNorm and Swin's index tables are absent from some
    # published files, and the model has them right by construction.
    optional = ('num_batches_tracked', 'relative_position_index')
    missing = [k for k in own if k not in state and not k.endswith(optional)]
    extra = [k for k in state if k not in own and not k.endswith(optional)]
    shapes = [f'{k} ({tuple(state[k].shape)} instead of {tuple(own[k].shape)})'
              for k in own if k in state and state[k].shape != own[k].shape]
    # torch would copy integers into a float weight without a word.
    types = [f'{k} ({state[k].dtype} instead of {own[k].dtype})' for k in own if k in state
             and own[k].is_floating_point() and not state[k].is_floating_point()]
    parts = []
    if missing:
        parts.append(f'missing: {_some(missing)}')
    if shapes:
        parts.append(f'of another shape: {_some(shapes)}')
    if types:
        parts.append(f'of another type: {_some(types)}')
    if allow_extra:
        extra = [k for k in extra if re.search(r'(^|\.)blocks\.\d+\.', k)]
    if extra:
        parts.append(f'unexpected: {_some(extra)}')
    return '; '.join(parts)


def require_match(model: nn.Module, state: Mapping[str, Tensor], path: str,
                  allow_extra: bool = False) -> None:
    """Raise if a state dict does not fit a model.

    Raises:
        UserError: Naming the file and the first differences.
    """
    differences = first_differences(model, state, allow_extra)
    if differences:
        raise UserError(f'{path} is not a checkpoint of this model. {differences}.\n'
                        'Use the config that the checkpoint was trained or quantized with.')


def require_same_modules(model: nn.Module, manifest: Mapping[str, Any], plan: Plan,
                         path: str) -> None:
    """Raise if a model has not the modules that a manifest and its plan name.

    A model that is quantized already must have the ops of the manifest.

    Raises:
        UserError: Naming the file and the first differences.
    """
    modules = dict(model.named_modules())
    present = [name for name, _ in named_quant_ops(model)]
    wrong = [name + difference for name, entry in manifest['modules'].items()
             for difference in _differences(modules.get(name), entry, plan[name])]
    if present:
        wrong += [f'{name} (quantized on one side only)'
                  for name in (*plan, *present) if (name in plan) != (name in present)]
    if wrong:
        raise UserError(f'{path} is not a quantized checkpoint of this model. Different: '
                        f'{_some(wrong)}.\n'
                        'Use the config that the checkpoint was quantized with.')


def _differences(module: Optional[nn.Module], entry: Mapping[str, Any],
                 specs: Mapping[str, QuantSpec]) -> Iterator[str]:
    """What keeps a module from being the one that a manifest's entry is of."""
    if module is None:
        yield ' (absent)'
        return
    op = type(module) if isinstance(module, QuantOp) else op_for(module)
    if op is None or op.__name__ != entry['op']:
        yield f' (is {type(module).__name__}, the checkpoint has {entry["op"]})'
        return
    unknown = [role for role in specs if role not in op.roles]
    if unknown:
        yield f' (has no {", ".join(unknown)}, which the checkpoint quantizes)'
    elif 'weight' in specs and list(module.get_parameter('weight').shape) != entry['weight_shape']:
        yield (f'.weight (has shape {list(module.get_parameter("weight").shape)}, the checkpoint '
               f'{entry["weight_shape"]})')
    elif isinstance(module, QuantOp):
        own = {role: _kind(quantizer.spec) for role, quantizer in module.quantizers.items()}
        theirs = {role: _kind(spec) for role, spec in specs.items()}
        for role in {**own, **theirs}:
            if own.get(role) != theirs.get(role):
                yield (f' ({role}: {own.get(role, "float")}, the checkpoint '
                       f'{theirs.get(role, "float")})')


def _kind(spec: QuantSpec) -> str:
    """What of a spec the stored numbers depend on."""
    symmetry = 'symmetric' if spec.symmetric else 'asymmetric'
    return f'{spec.bits} bits, {symmetry}, {spec.granularity}'

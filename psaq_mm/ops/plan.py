# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which modules of a model are quantized, and how: a plan, before any change."""
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Callable, Dict, FrozenSet, List, Sequence

from torch import nn

from psaq_mm.errors import UserError
from psaq_mm.quantization import QuantSpec
from psaq_mm.quantization.spec import PER_TENSOR, PER_TOKEN
from psaq_mm.recipe.quantization import QuantizationSettings

from .op import QuantOp, op_for

if TYPE_CHECKING:
    from psaq_mm.adapters import Adapter

Plan = Dict[str, Dict[str, QuantSpec]]
"""Module name -> role name -> spec, in the model's own order."""


def _any_match(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _require_matches(key: str, patterns: Sequence[str], names: List[str],
                     where: str = '') -> None:
    """Raise for a wildcard that matches none of the names: a likely typo."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            examples = f'; names look like {names[0]}, {names[-1]}' if names else ''
            raise UserError(f'quantization.{key}: {pattern!r} matches no module that can be '
                            f'quantized{where}{examples}')


def kinds_in(model: nn.Module, settings: QuantizationSettings,
             adapter: 'Adapter') -> Callable[[str], Sequence[str]]:
    """Name of a module to what it is, of ``psaq_mm.recipe.quantization.KINDS``."""
    predictors: FrozenSet[str] = frozenset()
    if settings.scope == 'model':
        predictors = adapter.predictors(model)
    return lambda name: adapter.kinds(model, name, predictors)


def plan_quantization(model: nn.Module, settings: QuantizationSettings,
                      adapter: 'Adapter') -> Plan:
    """Choose the modules and specs of a quantization of a float model.

    Raises:
        UserError: If the model is quantized already, an ``include``,
            ``exclude`` or ``overrides`` wildcard matches nothing that can be
            quantized, or nothing is left.
    """
    roles: Dict[str, List[str]] = {}  # of every module that the placement could quantize
    for name, module in model.named_modules():
        if isinstance(module, QuantOp):
            raise UserError(f'the model is quantized already (module {name}); pass the float '
                            'model, or unwrap it first')
        op = op_for(module)
        placed = [role for role in op.roles if role in settings.placed_roles] if op else []
        if 'output' in placed and not adapter.is_output_point(model, name):
            placed.remove('output')
        if placed:
            roles[name] = placed
    candidates = [name for name in roles if adapter.in_scope(model, name, settings.scope)]
    _require_matches('include', settings.include, candidates, f' in scope {settings.scope!r}')
    # These may name what another scope would hold.
    _require_matches('exclude', settings.exclude, list(roles))
    # Nobody wrote those of the defaults, and a placement or model may lack what they name.
    unasked = QuantizationSettings().overrides
    _require_matches('overrides', [p for p in settings.overrides
                                   if p not in unasked and not p.startswith('@')], list(roles))
    plan: Plan = {}
    idle = adapter.idle(model) if settings.scope == 'model' else frozenset()
    kinds = kinds_in(model, settings, adapter)
    for name in candidates:
        if name not in idle and _any_match(name, settings.include) \
                and not _any_match(name, settings.exclude):
            plan[name] = {r: _fitting(settings.spec_for(name, r, kinds(name)), r,
                                      model.get_submodule(name)) for r in roles[name]}
    if not plan:
        raise UserError('quantization: nothing is left to quantize after include, exclude and '
                        'placement')
    return plan


def _fitting(spec: QuantSpec, role: str, module: nn.Module) -> QuantSpec:
    """A spec as a module can have it: outputs of a convolution mix pixels, which would have one
    scale each."""
    if role == 'input' and spec.granularity == PER_TOKEN and not isinstance(module, nn.Linear):
        return replace(spec, granularity=PER_TENSOR)
    return spec


def unquantized_weights(model: nn.Module, plan: Plan, adapter: 'Adapter', scope: str) -> List[str]:
    """Names of modules in scope whose weights a plan does not quantize.

    Returns:
        list[str]: ``name (class)`` of each module that has a weight matrix
        or kernel of its own: excluded ones, and those without an op.
    """
    names = []
    for name, module in model.named_modules():
        weight = module._parameters.get('weight')
        if weight is not None and weight.dim() > 1 and 'weight' not in plan.get(name, {}) \
                and adapter.in_scope(model, name, scope):
            names.append(f'{name} ({type(module).__name__})')
    return names

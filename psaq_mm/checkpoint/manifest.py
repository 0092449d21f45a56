# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The part of a quantized checkpoint that says what is quantized how."""
from typing import Any, Dict, Mapping, Optional

from torch import nn

from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops
from psaq_mm.ops.plan import Plan
from psaq_mm.quantization import QuantSpec
from psaq_mm.sections import is_integer
from psaq_mm.version import __version__

MANIFEST_KEY = 'psaq_mm'
"""Key of the manifest beside ``state_dict`` in a checkpoint."""

STATE_KEY = 'quantized_state_dict'
"""Key of the weights; under ``state_dict`` stands what stops other loaders."""

FORMAT_VERSION = 3
"""1 had the weights under ``state_dict``, and all of a spec in the manifest; up to 2, integers of
3 bits took 4, and those of 5 to 7 took 8."""

_FORMAT = ('bits', 'symmetric', 'granularity')


def build_manifest(model: nn.Module, about: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """Describe the quantized ops of a model, in plain dicts, lists and numbers.

    Returns:
        dict: ``format_version``, ``psaq_mm_version``, ``modules`` (name ->
        ``op``, ``roles`` and, where the weight is quantized,
        ``weight_shape``) and what ``about`` holds. Of each role the bits,
        symmetry and granularity are told; how its range was found is not.

    Raises:
        UserError: If ``about`` would replace one of these.
    """
    modules: Dict[str, Dict[str, Any]] = {}
    for name, op in named_quant_ops(model):
        roles = {role: _described(quantizer.spec) for role, quantizer in op.quantizers.items()}
        modules[name] = dict(op=type(op).__name__, roles=roles)
        if op.weight_quantizer is not None:
            modules[name]['weight_shape'] = list(op.weight.shape)
    manifest = dict(format_version=FORMAT_VERSION, psaq_mm_version=__version__,
                    modules=modules)
    taken = [key for key in about or {} if key in manifest]
    if taken:
        raise UserError(f'{", ".join(taken)} cannot be recorded in a checkpoint: the manifest has '
                        'an entry of that name; choose another')
    return {**manifest, **(about or {})}


def _described(spec: QuantSpec) -> Dict[str, Any]:
    values = {key: getattr(spec, key) for key in _FORMAT}
    return dict(values, rotate=True) if spec.rotate else values


def is_quantized(checkpoint: Any) -> bool:
    """Whether a loaded checkpoint is one of ours."""
    return isinstance(checkpoint, Mapping) and MANIFEST_KEY in checkpoint


def read_manifest(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """The manifest of a quantized checkpoint, checked.

    Raises:
        UserError: If it was written in a newer format, or is damaged.
    """
    manifest = checkpoint[MANIFEST_KEY]
    version = manifest.get('format_version', 0) if isinstance(manifest, Mapping) else 0
    if not is_integer(version) or version < 1:
        raise UserError(f'the checkpoint\'s {MANIFEST_KEY!r} entry is not a manifest '
                        '(no format_version): the file is damaged, quantize again')
    if version > FORMAT_VERSION:
        raise UserError(f'the checkpoint has format version {version}, this psaq_mm reads up to '
                        f'{FORMAT_VERSION}: update psaq_mm')
    if not isinstance(manifest.get('modules'), Mapping) or not manifest['modules']:
        raise UserError('the checkpoint\'s manifest names no quantized modules: the file is '
                        'damaged, quantize again')
    for name, entry in manifest['modules'].items():
        if not isinstance(name, str) or not _is_entry(entry):
            raise UserError(f'the checkpoint\'s manifest does not say how {name} is quantized: '
                            'the file is damaged, quantize again')
    return dict(manifest)


def _is_entry(entry: Any) -> bool:
    """Whether this can describe a module; its specs are checked as they are built."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get('op'), str):
        return False
    roles, shape = entry.get('roles'), entry.get('weight_shape')
    if not isinstance(roles, Mapping) or not roles:
        return False
    if not all(isinstance(k, str) and isinstance(v, Mapping) for k, v in roles.items()):
        return False
    if 'weight' not in roles:
        return shape is None
    return isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)


def plan_of_manifest(manifest: Mapping[str, Any]) -> Plan:
    """The plan that rebuilds the quantized ops of a manifest of :func:`read_manifest`.

    Raises:
        UserError: If a spec is damaged; its module and role are named.
    """
    plan: Plan = {}
    for name, entry in manifest['modules'].items():
        plan[name] = {}
        for role, spec in entry['roles'].items():
            where = f'manifest of {name}, {role}'
            missing = [key for key in _FORMAT if key not in spec]
            if missing:
                raise UserError(f'{where}: {", ".join(missing)} missing')
            # Whatever else is told, such as an observer of format 1, loading has no use for.
            plan[name][role] = QuantSpec.from_dict(
                {key: spec[key] for key in (*_FORMAT, 'rotate') if key in spec}, where)
    return plan

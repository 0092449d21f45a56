# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The ``quantization`` section of a config."""
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Collection, Dict, Mapping, Optional, Sequence, Union

from psaq_mm.errors import UserError
from psaq_mm.sections import build_section, is_number, nearest

from psaq_mm.quantization.placement import ROLES, resolve_placement
from psaq_mm.quantization.spec import NEAREST, QuantSpec

SCOPES = ('backbone', 'model')

KINDS = ('patch_embed', 'predictor', 'roi_head', 'segmentor')
"""Layers that ``overrides`` may name as ``@patch_embed`` and so on, whatever they
are called in a model: the first, the last ones, those that run on proposed
regions, and all of a model that labels every pixel."""


def _patterns(value: Any, key: str) -> Sequence[str]:
    if isinstance(value, str):
        return (value, )
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise UserError(f'{key} must be a wildcard or a list of wildcards, got {value!r}')
    return tuple(value)


@dataclass
class QuantizationSettings:
    """What is quantized, and how.

    Args:
        weight (dict): Arguments of :class:`QuantSpec` for weights. Defaults
            to 8 bits, symmetric, per channel, min-max.
        activation (dict): Arguments of :class:`QuantSpec` for activations.
            Defaults to 8 bits, asymmetric, per tensor, min-max.
        placement (str or list[str]): ``operands`` (inputs of Linear, Conv2d
            and both attention matmuls), ``v1`` (as PSAQ-ViT V1), or a list
            of roles. Defaults to ``operands``.
        scope (str): ``backbone`` or ``model`` (neck and heads too).
            Defaults to ``backbone``.
        include (str or list[str]): Shell wildcards of module names, such as
            ``backbone.stages.*``. Defaults to ``*``.
        exclude (str or list[str]): Wildcards of modules to leave float; it
            wins over ``include``. Defaults to none.
        patch_embed_bits (int, optional): Bits of the patch embedding's
            weight and input; None for those of the rest. Defaults to 8:
            at 4 bits this layer alone costs several points [measured].
        predictor_bits (int, optional): Bits of the layers whose output is the
            model's: box and class predictors, mask logits, classifiers; only
            scope ``model`` has them. None for those of the rest. Defaults to
            8: at 4 bits the box regressor alone costs two points [measured].
        roles (dict): Role name to arguments that differ from ``activation``
            (or ``weight``), e.g. ``dict(attention=dict(bits=8))``.
        overrides (dict): Wildcard, or ``@`` and one of :data:`KINDS`, to a
            dict with ``weight``, ``activation`` or role keys, applied last
            and in order. A wildcard must match a module, a kind need not.
        channel_limit (float, optional): How many times the width of the median
            channel a channel after a LayerNorm may have, at least 1; what is
            beyond moves into weights, by :func:`psaq_mm.equalize`. None for no
            limit. Defaults to None.
        learnable_ranges (bool): If True scales and zero points are
            parameters. Defaults to False.
    """
    weight: Mapping[str, Any] = field(default_factory=dict)
    activation: Mapping[str, Any] = field(default_factory=dict)
    placement: Union[str, Sequence[str]] = 'operands'
    scope: str = 'backbone'
    include: Union[str, Sequence[str]] = ('*', )
    exclude: Union[str, Sequence[str]] = ()
    patch_embed_bits: Optional[int] = 8
    predictor_bits: Optional[int] = 8
    roles: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    channel_limit: Optional[float] = None
    learnable_ranges: bool = False

    def __post_init__(self) -> None:
        self.include = _patterns(self.include, 'include')
        self.exclude = _patterns(self.exclude, 'exclude')
        if self.scope not in SCOPES:
            raise UserError(f'scope must be one of {", ".join(SCOPES)}, got {self.scope!r}')
        if not isinstance(self.learnable_ranges, bool):
            raise UserError('learnable_ranges must be True or False, '
                            f'got {self.learnable_ranges!r}')
        limit = self.channel_limit
        if limit is not None and not (is_number(limit) and limit >= 1):
            raise UserError(f'channel_limit must be None or a number from 1 on, got {limit!r}')
        self.placed_roles = resolve_placement(self.placement)
        for name, values in (('weight', self.weight), ('activation', self.activation),
                             ('roles', self.roles), ('overrides', self.overrides)):
            if not isinstance(values, Mapping):
                raise UserError(f'{name} must be a dict, got {values!r}')
        for role in self.roles:
            self._check_target(role, self.roles[role], f'roles.{role}', ROLES)
        for pattern, changes in self.overrides.items():
            if pattern == '_scope_':
                continue
            if pattern.startswith('@') and pattern[1:] not in KINDS:
                raise UserError(f'unknown kind of layers overrides[{pattern!r}]; known: '
                                + ', '.join(f'@{kind}' for kind in KINDS))
            if not isinstance(changes, Mapping):
                raise UserError(f'overrides[{pattern!r}] must be a dict, got {changes!r}')
            for target in changes:
                self._check_target(target, changes[target], f'overrides[{pattern!r}].{target}',
                                   ('activation', *ROLES))
        # Build every spec once, so that a bad value fails before heavy work; the groups'
        # first, so that the message names the key that holds it.
        for group in ('weight', 'activation'):
            QuantSpec.from_dict(self._of_group(group), group)
        for role in sorted(self.placed_roles):
            for kinds in ((), *((kind, ) for kind in KINDS)):
                self.spec_for('', role, kinds)
        for pattern in self.overrides:
            for role in sorted(self.placed_roles):
                self.spec_for(pattern, role)

    @staticmethod
    def _check_target(name: str, values: Any, where: str, known: Sequence[str]) -> None:
        if name == '_scope_':
            return
        if name not in known:
            raise UserError(f'unknown key {where}.{nearest(name, known)} '
                            f'Known keys: {", ".join(known)}')
        if not isinstance(values, Mapping):
            raise UserError(f'{where} must be a dict, got {values!r}')

    def _of_group(self, group: str) -> Dict[str, Any]:
        """What holds for all weights, or all activations."""
        weight = group == 'weight'
        return dict(dict(bits=8, symmetric=weight,
                         granularity='per_channel' if weight else 'per_tensor'),
                    **getattr(self, group))

    def spec_for(self, module_name: str, role: str,
                 kinds: Collection[str] = ()) -> QuantSpec:
        """The spec of one tensor.

        Later ones win: the group's defaults, ``weight`` or ``activation``,
        ``patch_embed_bits`` or ``predictor_bits``, ``roles``, ``overrides``.

        Args:
            module_name (str): Full name of the float module.
            role (str): The tensor's role.
            kinds (Collection[str]): What the module is, of :data:`KINDS`.
                Defaults to none of them.

        Returns:
            QuantSpec: Its spec.

        Raises:
            UserError: If a value is out of range.
        """
        group = 'weight' if role == 'weight' else 'activation'
        values, where = self._of_group(group), group
        for kind in ('patch_embed', 'predictor'):
            key = f'{kind}_bits'
            if kind in kinds and getattr(self, key) is not None:
                values['bits'] = getattr(self, key)
                where = key
        if role in self.roles:
            values.update(self.roles[role])
            where = f'roles.{role}'
        for pattern, changes in self.overrides.items():
            if fnmatchcase(module_name, pattern) or module_name == pattern \
                    or (pattern.startswith('@') and pattern[1:] in kinds):
                for target in (group, role):
                    if target in changes:
                        values.update(changes[target])
                        where = f'overrides[{pattern!r}].{target}'
        spec = QuantSpec.from_dict(values, where)
        if group == 'activation' and spec.rounding != NEAREST:
            raise UserError(f"{where}.rounding must be '{NEAREST}': only weights can be rounded "
                            f'otherwise, got {spec.rounding!r}')
        return spec

    @classmethod
    def from_dict(cls, values: Optional[Mapping[str, Any]]) -> 'QuantizationSettings':
        """Build from the ``quantization`` section of a config."""
        return build_section(cls, values, 'quantization')

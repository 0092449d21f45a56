# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What is quantized, and how: the ``quantization`` section of a recipe."""
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Collection, Dict, FrozenSet, Mapping, Optional, Sequence, Union

from psaq_mm.errors import UserError
from psaq_mm.quantization.placement import ROLES, resolve_placement
from psaq_mm.quantization.spec import GPTQ, NEAREST, PER_CHANNEL, PER_TOKEN, QuantSpec
from psaq_mm.sections import build_section, is_integer, is_number, nearest

from .merging import merged, plain_copy

SCOPES = ('backbone', 'model')

BUDGETS = ('mean_bits', 'target_size', 'max_drop')
"""Keys that ask for bits to be chosen; one at most."""

UNITS = dict(B=1, kB=10**3, MB=10**6, GB=10**9, KiB=2**10, MiB=2**20, GiB=2**30)
"""Of ``target_size``, in bytes."""

KINDS = ('patch_embed', 'predictor', 'roi_head', 'segmentor')
"""Layers that ``overrides`` may name as ``@patch_embed`` and so on, whatever they
are called in a model: the first, the last ones, those that run on proposed
regions, and all layers of a segmentor."""


def _patterns(value: Any, key: str) -> Sequence[str]:
    if isinstance(value, str):
        return (value, )
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise UserError(f'{key} must be a wildcard or a list of wildcards, got {value!r}')
    return tuple(value)


def _matches(name: str, pattern: str) -> bool:
    # Mixed precision names each module: no regular expression for those.
    return name == pattern or (any(c in pattern for c in '*?[') and fnmatchcase(name, pattern))


def size_in_bytes(size: Any) -> Optional[int]:
    """Bytes of a size such as ``'12MB'``; None if it is none."""
    if is_integer(size):
        return size if size > 0 else None
    found = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*', size) \
        if isinstance(size, str) else None
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if found is None or found[2].lower() not in units:
        return None
    return int(float(found[1]) * units[found[2].lower()]) or None


def _candidates(value: Any) -> Sequence[int]:
    if not isinstance(value, (list, tuple)) or not value or not all(map(is_integer, value)):
        raise UserError(f'candidate_bits must be a list of bits, got {value!r}')
    others = [bits for bits in value if not 2 <= bits <= 8]
    if others:
        raise UserError(f'candidate_bits: no format of an engine has {others[0]} bits; they must '
                        'be from 2 to 8')
    return tuple(sorted(set(value)))


def _not_of_activations(where: str, rounding: str) -> UserError:
    return UserError(f"{where}.rounding must be '{NEAREST}': only weights can be rounded "
                     f'otherwise, got {rounding!r}')


def _weight() -> QuantSpec:
    return QuantSpec(bits=8, symmetric=True, granularity=PER_CHANNEL, rounding=GPTQ)


def _activation() -> QuantSpec:
    return QuantSpec(bits=8, symmetric=False, margin=2.)


def _roles() -> Dict[str, Any]:
    return dict(
        # Softmax output: most of it is near 0, and it cannot leave [0, 1].
        attention=dict(observer=dict(type='MSEObserver', min_factor=0.02, candidates=100),
                       margin=4., bounds=(0., 1.)),
        # After LayerNorm and GELU, where a few channels are far out.
        input=dict(observer=dict(type='PercentileObserver', percentile=0.999)))


def _overrides() -> Dict[str, Any]:
    everything = dict(observer=dict(type='MinMaxObserver'))
    return {
        # Averages over tokens, images, and inputs of layers that keep 8 bits: nothing to clip.
        '*attn*.proj': dict(input=everything),
        # Calibration shows the darkest and the brightest pixel: no margin is needed.
        '@patch_embed': dict(input=dict(everything, margin=0.)),
        # Few regions hold objects, and synthetic images fewer than photographs: the range
        # needs a margin, and a margin needs bits. Weights have as many as the rest.
        '@roi_head': dict(input=dict(
            bits=8, margin=2., observer=dict(type='PercentileObserver', percentile=0.9995))),
        '@predictor': dict(input=everything)}


@dataclass(frozen=True)
class QuantizationSettings:
    """What is quantized, and how. The defaults are those of the preset ``default``.

    Args:
        weight (QuantSpec): How weights are quantized. Defaults to 8 bits, symmetric,
            per channel, min-max, rounded by GPTQ.
        activation (QuantSpec): How activations are. Defaults to 8 bits, asymmetric,
            per tensor, min-max, margin 2.
        placement (str or list[str]): ``operands`` (inputs of Linear, Conv2d
            and both attention matmuls), ``v1`` (as PSAQ-ViT V1), or a list
            of roles. Defaults to ``operands``.
        scope (str): ``model``, or ``backbone``: neck and heads stay float, as all shipped
            recipes with fewer than 8 bits have it. Defaults to ``model``.
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
        roles (dict): Role name to arguments of :class:`QuantSpec` that differ from
            ``activation`` (or ``weight``), e.g. ``dict(attention=dict(bits=8))``.
            Defaults to range rules for softmax outputs and layer inputs.
        overrides (dict): Wildcard, or ``@`` and one of :data:`KINDS`, to a
            dict with ``weight``, ``activation`` or role keys, applied last
            and in order. A wildcard other than the defaults' must match a
            module, a kind need not.
            Defaults to rules for a few kinds of layers.
        channel_limit (float, optional): How many times the width of the median
            channel a channel after a LayerNorm may have, at least 1; what is
            beyond moves into weights, by :func:`psaq_mm.equalize`. None for no
            limit. Defaults to 1.5.
        mean_bits (float, optional): Bits of weights on the average, for mixed precision: each
            module gets bits of its own by :func:`psaq_mm.allocate`. Activations get bits of
            their own too, on the average those of ``activation``; what the other settings pin
            stays, and does not count. Defaults to None.
        target_size (str or int, optional): In its place, the most bytes that the checkpoint
            may have, such as ``'12MB'``. Defaults to None.
        max_drop (float, optional): In their place, the most percent of the outputs' power that
            may become error; the checkpoint gets as small as that allows. Defaults to None.
        candidate_bits (list[int]): Bits that modules may get in mixed precision. Defaults to
            2, 3, 4, 5, 6 and 8.

    Raises:
        UserError: If a value is outside of what is described here.
    """
    weight: QuantSpec = field(default_factory=_weight)
    activation: QuantSpec = field(default_factory=_activation)
    placement: Union[str, Sequence[str]] = 'operands'
    scope: str = 'model'
    include: Union[str, Sequence[str]] = ('*', )
    exclude: Union[str, Sequence[str]] = ()
    patch_embed_bits: Optional[int] = 8
    predictor_bits: Optional[int] = 8
    roles: Mapping[str, Any] = field(default_factory=_roles)
    overrides: Mapping[str, Any] = field(default_factory=_overrides)
    channel_limit: Optional[float] = 1.5
    mean_bits: Optional[float] = None
    target_size: Union[None, str, int] = None
    max_drop: Optional[float] = None
    candidate_bits: Sequence[int] = (2, 3, 4, 5, 6, 8)

    def __post_init__(self) -> None:
        def store(key: str, value: Any) -> None:
            object.__setattr__(self, key, value)

        store('include', _patterns(self.include, 'include'))
        store('exclude', _patterns(self.exclude, 'exclude'))
        if self.scope not in SCOPES:
            raise UserError(f'scope must be one of {", ".join(SCOPES)}, got {self.scope!r}')
        limit = self.channel_limit
        if limit is not None and not (is_number(limit) and limit >= 1):
            raise UserError(f'channel_limit must be None or a number from 1 on, got {limit!r}')
        resolve_placement(self.placement)
        if not isinstance(self.placement, str):
            store('placement', tuple(self.placement))
        for name in ('weight', 'activation'):
            if not isinstance(getattr(self, name), QuantSpec):
                raise UserError(f'{name} must be a QuantSpec, got {getattr(self, name)!r}')
        if self.activation.rounding != NEAREST:
            raise _not_of_activations('activation', self.activation.rounding)
        for name in ('patch_embed_bits', 'predictor_bits'):
            bits = getattr(self, name)
            if bits is not None and (not is_integer(bits) or not 2 <= bits <= 8):
                raise UserError(f'{name} must be None or an integer from 2 to 8, got {bits!r}')
        for name in ('roles', 'overrides'):
            if not isinstance(getattr(self, name), Mapping):
                raise UserError(f'{name} must be a dict, got {getattr(self, name)!r}')
            store(name, plain_copy(getattr(self, name)))
        for role in self.roles:
            self._check_target(role, self.roles[role], f'roles.{role}', ROLES)
        for pattern, changes in self.overrides.items():
            if pattern.startswith('@') and pattern[1:] not in KINDS:
                raise UserError(f'unknown kind of layers overrides[{pattern!r}]; known: '
                                + ', '.join(f'@{kind}' for kind in KINDS))
            if not isinstance(changes, Mapping):
                raise UserError(f'overrides[{pattern!r}] must be a dict, got {changes!r}')
            for target in changes:
                self._check_target(target, changes[target], f'overrides[{pattern!r}].{target}',
                                   ('activation', *ROLES))
        store('candidate_bits', _candidates(self.candidate_bits))
        self._check_budget()
        # Build every spec once, so that a bad value fails before heavy work.
        for role in sorted(self.placed_roles):
            for kinds in ((), *((kind, ) for kind in KINDS)):
                self.spec_for('', role, kinds)
        for pattern in self.overrides:
            for role in sorted(self.placed_roles):
                self.spec_for(pattern, role)

    def _check_budget(self) -> None:
        """Raise for a budget that no model could keep to."""
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) > 1:
            raise UserError(f'{given[0]}={getattr(self, given[0])!r} contradicts {given[1]}='
                            f'{getattr(self, given[1])!r}: give one budget, and None for the '
                            'others')
        low, high = min(self.candidate_bits), max(self.candidate_bits)
        if self.mean_bits is not None:
            if not is_number(self.mean_bits):
                raise UserError(f'mean_bits must be a number of bits, got {self.mean_bits!r}')
            if not low <= self.mean_bits <= high:
                side = f'below the smallest possible, {low}' if self.mean_bits < low \
                    else f'above the largest possible, {high}'
                raise UserError(f'mean_bits={self.mean_bits:g} is {side} (candidate_bits)')
        if self.target_size is not None and size_in_bytes(self.target_size) is None:
            raise UserError(f"target_size must be bytes or a size such as '12MB' (units: "
                            f'{", ".join(UNITS)}), got {self.target_size!r}')
        if self.max_drop is not None and not (is_number(self.max_drop)
                                              and 0 < self.max_drop <= 100):
            raise UserError('max_drop must be a percentage above 0, up to 100, got '
                            f'{self.max_drop!r}')
        if given and not low <= self.activation.bits <= high:
            raise UserError(f'candidate_bits go from {low} to {high}, and activations are to have '
                            f'{self.activation.bits} on the average (activation.bits)')

    @property
    def budget(self) -> str:
        """str: The budget that bits are to be chosen for, such as ``mean_bits=3``; or empty."""
        return next((f'{key}={getattr(self, key)}' for key in BUDGETS
                     if getattr(self, key) is not None), '')

    @property
    def placed_roles(self) -> FrozenSet[str]:
        """frozenset[str]: The roles behind :attr:`placement`."""
        return resolve_placement(self.placement)

    @staticmethod
    def _check_target(name: str, values: Any, where: str, known: Sequence[str]) -> None:
        if name not in known:
            raise UserError(f'unknown key {where}.{nearest(name, known)} '
                            f'Known keys: {", ".join(known)}')
        if not isinstance(values, Mapping):
            raise UserError(f'{where} must be a dict, got {values!r}')

    def spec_for(self, module_name: str, role: str,
                 kinds: Collection[str] = ()) -> QuantSpec:
        """The spec of one tensor of the float module of that name.

        Later ones win: the group's defaults, ``weight`` or ``activation``,
        ``patch_embed_bits`` or ``predictor_bits``, ``roles``, ``overrides``.

        Args:
            kinds (Collection[str]): What the module is, of :data:`KINDS`.
                Defaults to none of them.

        Raises:
            UserError: If a value is out of range.
        """
        group = 'weight' if role == 'weight' else 'activation'
        values, where = getattr(self, group).to_dict(), group
        for kind in ('patch_embed', 'predictor'):
            key = f'{kind}_bits'
            if kind in kinds and getattr(self, key) is not None:
                values['bits'] = getattr(self, key)
                where = key
        if role in self.roles:
            values.update(self.roles[role])
            where = f'roles.{role}'
        for pattern, changes in self.overrides.items():
            if _matches(module_name, pattern) \
                    or (pattern.startswith('@') and pattern[1:] in kinds):
                for target in (group, role):
                    if target in changes:
                        values.update(changes[target])
                        where = f'overrides[{pattern!r}].{target}'
        spec = QuantSpec.from_dict(values, where)
        if group == 'activation' and spec.rounding != NEAREST:
            raise _not_of_activations(where, spec.rounding)
        if spec.rotate and role != 'input':
            raise UserError(f'{where}.rotate must be False: only inputs of layers (roles.input) '
                            f'can be rotated, and this sets it for {role}')
        if spec.granularity == PER_TOKEN and role not in ('input', 'attention'):
            raise UserError(f"{where}.granularity cannot be '{PER_TOKEN}' for {role}: only inputs "
                            'of linear layers (roles.input) and softmax outputs '
                            '(roles.attention) can have a scale for each token')
        return spec

    @classmethod
    def from_dict(cls, values: Optional[Mapping[str, Any]]) -> 'QuantizationSettings':
        """Build from the ``quantization`` section of a config. Of ``weight`` and
        ``activation`` only what differs from their defaults need be there."""
        given = dict(values) if isinstance(values, Mapping) else values
        for name, default in (('weight', _weight), ('activation', _activation)):
            if isinstance(given, dict) and name in given \
                    and not isinstance(given[name], QuantSpec):
                if not isinstance(given[name], Mapping):
                    raise UserError(f'quantization.{name} must be a dict, got {given[name]!r}')
                given[name] = QuantSpec.from_dict(merged(default().to_dict(), given[name]),
                                                  f'quantization.{name}')
        return build_section(cls, given, 'quantization')

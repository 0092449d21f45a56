# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The settings of one tensor at another bit width than the rest."""
import functools
from dataclasses import replace
from typing import Any, Collection, Mapping

from psaq_mm.quantization import QuantSpec
from psaq_mm.quantization.spec import PER_TOKEN

from .quantization import BUDGETS, QuantizationSettings
from .recipe import Recipe
from .shipped import EVEN_ATTENTION

BASE_OF_WIDTH: Mapping[int, str] = {2: 'w3a3', 3: 'w3a3', 4: 'w4a4', 5: 'w6a6', 6: 'w6a6',
                                    7: 'w8a8', 8: 'w8a8'}
"""Bits to the shipped recipe whose margins and range rules belong to them [choice: 2, 5, 7]."""

OF_WIDTH = ('observer', 'margin')
"""What shipped recipes set by the bits."""


ONE_SCALE: Mapping[str, Mapping[str, Any]] = dict(
    PercentileObserver=dict(type='PercentileObserver', percentile=0.99),
    MSEObserver=EVEN_ATTENTION)
"""A range rule to what it becomes for 8 integers and one scale for all tokens [measured]."""


def without_budget(settings: QuantizationSettings, **changes: Any) -> QuantizationSettings:
    """Settings with other values, for whose bits nothing is left to choose."""
    return replace(settings, **{**dict.fromkeys(BUDGETS), **changes})


class FreeTensors:
    """Which tensors have the bits of ``weight`` or ``activation``: nothing pins theirs.

    Args:
        settings (QuantizationSettings): What is quantized, and how.
    """

    def __init__(self, settings: QuantizationSettings) -> None:
        self._settings = {bits: without_budget(
            settings, weight=replace(settings.weight, bits=bits),
            activation=replace(settings.activation, bits=bits)) for bits in (2, 8)}

    def has(self, name: str, role: str, kinds: Collection[str] = ()) -> bool:
        """Whether a tensor is one; arguments are those of
        :meth:`QuantizationSettings.spec_for`."""
        return all(settings.spec_for(name, role, kinds).bits == bits
                   for bits, settings in self._settings.items())


def spec_at_width(settings: QuantizationSettings, bits: int, name: str, role: str,
                  kinds: Collection[str] = ()) -> QuantSpec:
    """The spec of a tensor at other bits than the settings give it.

    Margin and range rule become those of the shipped recipe of these bits, where they are those
    of the shipped recipe of the tensor's bits; what a user has set stays. Where that range rule
    is made for tokens with scales of their own, and these have none, it is of :data:`ONE_SCALE`.
    """
    spec = settings.spec_for(name, role, kinds)
    before = _shipped(spec.bits).spec_for(name, role, kinds)
    # Over the sizes of their tokens inputs are alike: there is no rule by the name of a layer.
    nameless = spec.granularity == PER_TOKEN
    after = _shipped(bits).spec_for('' if nameless else name, role, kinds)
    changes = {key: getattr(after, key) for key in OF_WIDTH
               if getattr(spec, key) == getattr(before, key)}
    if after.granularity == PER_TOKEN != spec.granularity and 'observer' in changes:
        changes['observer'] = ONE_SCALE.get(spec.observer['type'], spec.observer)
    return replace(spec, bits=bits, **changes)


@functools.cache
def _shipped(bits: int) -> QuantizationSettings:
    return Recipe.shipped(BASE_OF_WIDTH[bits]).quantization

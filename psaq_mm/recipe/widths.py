# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The settings of one tensor at another bit width than the rest."""
import functools
from dataclasses import replace
from typing import Collection, Mapping

from psaq_mm.quantization import QuantSpec

from .quantization import QuantizationSettings
from .recipe import Recipe

BASE_OF_WIDTH: Mapping[int, str] = {2: 'w3a3', 3: 'w3a3', 4: 'w4a4', 5: 'w6a6', 6: 'w6a6',
                                    7: 'w8a8', 8: 'w8a8'}
"""Bits to the shipped recipe whose margins and range rules belong to them [choice: 2, 5, 7]."""

OF_WIDTH = ('observer', 'margin')
"""What shipped recipes set by the bits."""


def at_width(settings: QuantizationSettings, bits: int) -> QuantizationSettings:
    """Settings with as many bits for all weights and activations that have the default's."""
    return replace(settings, weight=replace(settings.weight, bits=bits),
                   activation=replace(settings.activation, bits=bits))


def is_free(settings: QuantizationSettings, name: str, role: str,
            kinds: Collection[str] = ()) -> bool:
    """Whether the bits of a tensor are those of ``weight`` or ``activation``: nothing pins them.

    Arguments are those of :meth:`QuantizationSettings.spec_for`.
    """
    return all(at_width(settings, bits).spec_for(name, role, kinds).bits == bits
               for bits in (2, 8))


def spec_at_width(settings: QuantizationSettings, bits: int, name: str, role: str,
                  kinds: Collection[str] = ()) -> QuantSpec:
    """The spec of a tensor at other bits than the settings give it.

    Margin and range rule become those of the shipped recipe of these bits, where they are those
    of the shipped recipe of the tensor's bits; what a user has set stays.
    """
    spec = settings.spec_for(name, role, kinds)
    before, after = (_shipped(width).spec_for(name, role, kinds) for width in (spec.bits, bits))
    changes = {key: getattr(after, key) for key in OF_WIDTH
               if getattr(spec, key) == getattr(before, key)}
    return replace(spec, bits=bits, **changes)


@functools.lru_cache(maxsize=None)
def _shipped(bits: int) -> QuantizationSettings:
    return Recipe.shipped(BASE_OF_WIDTH[bits]).quantization

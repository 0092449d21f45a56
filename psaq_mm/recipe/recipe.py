# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""All settings of a quantization, as one value."""
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, Mapping

from psaq_mm.errors import UserError
from psaq_mm.sections import nearest

from .calibration import CalibrationSettings
from .evolution import EvolutionSettings
from .merging import merged, plain_copy
from .quantization import QuantizationSettings
from .reconstruction import ReconstructionSettings
from .shipped import BASES, PRESETS
from .synthesis import SynthesisSettings


@dataclass(frozen=True)
class Recipe:
    """What is done to a float model. The defaults are the preset ``default`` at W8A8.

        recipe = Recipe.shipped('w4a4')  # of the backbone
        recipe = recipe.changed(dict(quantization=dict(scope='model')))

    Args:
        quantization (QuantizationSettings): What is quantized, and how.
        synthesis (SynthesisSettings): How images are made.
        calibration (CalibrationSettings): How ranges are set.
        reconstruction (ReconstructionSettings): How blocks of the student learn.
        evolution (EvolutionSettings): How student and images evolve.
    """
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    reconstruction: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)

    def __post_init__(self) -> None:
        for section in fields(self):
            value = getattr(self, section.name)
            expected: Any = section.default_factory
            if not isinstance(value, expected):
                raise UserError(f'{section.name} must be {expected.__name__}, got {value!r}; '
                                'Recipe.from_dict and Recipe.changed take dicts')

    def __hash__(self) -> int:
        return hash(_hashable(self.to_dict()))

    @classmethod
    def shipped(cls, base: str = 'w8a8', preset: str = 'default') -> 'Recipe':
        """A recipe that is shipped.

        Args:
            base (str): Bits of weights and activations: ``w8a8``, ``w6a6``, ``w4a8``,
                ``w4a4`` or ``w3a3``. Defaults to ``w8a8``.
            preset (str): ``default``, ``fast`` or ``paper``. Defaults to
                ``default``.

        Returns:
            Recipe: The recipe.

        Raises:
            UserError: If there is no such base or preset.
        """
        _require_known('preset', preset, PRESETS)
        _require_known('recipe', base, BASES)
        return cls().changed(BASES[base]).changed(PRESETS[preset])

    def changed(self, changes: Mapping[str, Any]) -> 'Recipe':
        """A recipe with other values, merged by the rule of configs
        (:func:`psaq_mm.recipe.merging.merged`).

        Args:
            changes (Mapping): Section to what differs, in nested dicts. None for a
                section changes nothing; ``_delete_=True`` in a dict replaces it.

        Raises:
            UserError: If a section or key is unknown, or a value is out of range.
        """
        self._require_sections(changes, 'the changes of a recipe')
        for section, values in changes.items():
            if values is not None and not isinstance(values, Mapping):
                raise UserError(f'{section} must be a dict, got {values!r}')
        given = {section: values for section, values in changes.items() if values is not None}
        return self.from_dict(merged(self.to_dict(), given))

    def to_dict(self) -> Dict[str, Dict[str, Any]]:
        """The recipe in plain dicts, lists, strings and numbers: a copy."""
        return plain_copy(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'Recipe':
        """Build from :meth:`to_dict`. What is not there has its default.

        Raises:
            UserError: If a key is unknown or a value is out of range.
        """
        cls._require_sections(values, 'a recipe')
        return cls(quantization=QuantizationSettings.from_dict(values.get('quantization')),
                   synthesis=SynthesisSettings.from_dict(values.get('synthesis')),
                   calibration=CalibrationSettings.from_dict(values.get('calibration')),
                   reconstruction=ReconstructionSettings.from_dict(
                       values.get('reconstruction')),
                   evolution=EvolutionSettings.from_dict(values.get('evolution')))

    @classmethod
    def _require_sections(cls, values: Any, what: str) -> None:
        """Raise unless these are sections, by their names."""
        if not isinstance(values, Mapping):
            raise UserError(f'{what} must be a dict, got {values!r}')
        known = [f.name for f in fields(cls)]
        for section in values:
            if section not in known:
                raise UserError(f'unknown section {section!r}.{nearest(str(section), known)} '
                                f'Known sections: {", ".join(known)}')


def _hashable(value: Any) -> Any:
    """Nested dicts and lists as frozen sets and tuples."""
    if isinstance(value, Mapping):
        return frozenset((key, _hashable(part)) for key, part in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _require_known(what: str, name: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or name not in known:
        raise UserError(f'{what} must be one of {", ".join(sorted(known))}, '
                        f'got {name!r}.{nearest(str(name), known)}')

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The settings that are shipped: presets, and bases for widths."""
from pathlib import Path
from typing import Any, Dict

from mmengine.config import Config

from psaq_mm.errors import UserError
from psaq_mm.sections import nearest

SECTIONS = ('quantization', 'synthesis', 'evolution', 'calibration')

BASES = Path(__file__).resolve().parent / '.mim' / 'configs' / '_base_'
"""Where ``psaq_mm::_base_`` is."""

PRESETS = BASES / 'presets'
"""Where the files that ``preset`` names are."""


def apply_preset(config: Config) -> None:
    """Fill our sections in from the preset that a config names: its own values
    win over the preset's. Without the key, nothing happens.

    Raises:
        UserError: If there is no such preset.
    """
    name = config.get('preset')
    if name is None:
        return
    known = sorted(file.stem for file in PRESETS.glob('*.py'))
    if not known:
        raise UserError(f'the presets of psaq_mm are not installed (no {PRESETS}): run make, '
                        'or pip install psaq_mm')
    if name not in known:
        whose = f'config {config.filename}: ' if config.filename else ''
        raise UserError(f'{whose}preset must be one of {", ".join(known)}, '
                        f'got {name!r}.{nearest(str(name), known)}')
    preset = Config.fromfile(str(PRESETS / f'{name}.py'))
    own = {section: config[section] for section in SECTIONS if config.get(section) is not None}
    preset.merge_from_dict(own)
    for section in SECTIONS:
        config[section] = preset[section]


def shipped(base: str, preset: str = 'default') -> Dict[str, Dict[str, Any]]:
    """The sections that a config gets from one of our bases, for use in Python.

        sections = psaq_mm.shipped('w4a4')
        psaq_mm.quantize(student, **sections['quantization'])

    Args:
        base (str): Such as ``w4a4``: a file of ``psaq_mm::_base_``.
        preset (str): As in a config. Defaults to ``default``.

    Returns:
        dict[str, dict]: ``quantization``, ``synthesis``, ``evolution`` and
        ``calibration``, in plain values.

    Raises:
        UserError: If there is no such base or preset.
    """
    known = sorted(file.stem for file in BASES.glob('w*a*.py'))
    if base not in known:
        raise UserError(f'a base must be one of {", ".join(known) or "those installed by make"}, '
                        f'got {base!r}.{nearest(str(base), known)}')
    whole = Config.fromfile(str(BASES / f'{base}.py'))
    config = Config({k: whole[k] for k in SECTIONS if k in whole})
    config.preset = preset
    apply_preset(config)
    return {section: config[section].to_dict() for section in SECTIONS}

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Config sections to dataclasses: an unknown key is an error, not a typo kept."""
import difflib
import math
from dataclasses import fields
from typing import Any, Iterable, Mapping, Optional, Type, TypeVar

from psaq_mm.errors import UserError

T = TypeVar('T')


def is_number(value: object) -> bool:
    """Whether a config value is a finite number; True and False are none."""
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value))


def is_integer(value: object) -> bool:
    """Whether a config value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``" Did you mean 'bits'?"``, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean {found[0]!r}?' if found else ''


def build_section(cls: Type[T], values: Optional[Mapping[str, Any]], where: str) -> T:
    """Build a dataclass from a config section.

    Args:
        cls (type): A dataclass whose ``__post_init__`` checks its values.
        values (Mapping, optional): The section; None means all defaults.
        where (str): Dotted name of the section, for messages.

    Returns:
        The dataclass instance.

    Raises:
        UserError: If the section is not a dict, holds an unknown key (the
            nearest right name is given), or a value is out of range.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise UserError(f'{where} must be a dict, got {values!r}')
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    given = {}
    for key, value in values.items():
        if key == '_scope_':  # mmengine notes where an inherited dict came from
            continue
        if key not in known:
            raise UserError(f'unknown key {where}.{key}.{nearest(str(key), known)} '
                            f'Known keys: {", ".join(known)}')
        given[key] = value
    try:
        return cls(**given)
    except UserError as error:
        message, unknown = str(error), 'unknown key '
        if message.startswith(unknown):
            raise UserError(f'{unknown}{where}.{message[len(unknown):]}') from error
        raise UserError(message if message.startswith(where) else f'{where}.{message}') \
            from error

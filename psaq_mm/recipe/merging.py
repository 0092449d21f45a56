# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Changes on top of settings, by the rule of mmengine's configs."""
import copy
from typing import Any, Dict, Mapping

DELETE = '_delete_'
"""Key of a dict that replaces the one below instead of changing it."""

SCOPE = '_scope_'
"""Key by which mmengine notes where an inherited dict came from: no setting."""


def merged(below: Mapping[str, Any], changes: Mapping[str, Any]) -> Dict[str, Any]:
    """Settings with changes on top of them.

    Dicts are merged key by key, and anything else replaces what is below. A
    dict with ``_delete_=True`` replaces the dict below as a whole.

    Args:
        below (Mapping): Plain values, nested dicts among them; not changed.
        changes (Mapping): Likewise.

    Returns:
        dict: A deep copy; no dict in it has ``_delete_`` or ``_scope_``.
    """
    result = {} if changes.get(DELETE) else plain_copy(below)
    for key, value in changes.items():
        if key in (DELETE, SCOPE):
            continue
        if isinstance(value, Mapping):
            old = result.get(key)
            result[key] = merged(old if isinstance(old, Mapping) else {}, value)
        else:
            result[key] = plain_copy(value)
    return result


def plain_copy(value: Any) -> Any:
    """A deep copy in plain dicts and lists, without mmengine's marks. Tuples become
    lists, as in a file of JSON, so that equal settings are equal as plain values."""
    if isinstance(value, Mapping):
        return {k: plain_copy(v) for k, v in value.items() if k not in (DELETE, SCOPE)}
    if isinstance(value, (list, tuple)):
        return [plain_copy(v) for v in value]
    return copy.deepcopy(value)

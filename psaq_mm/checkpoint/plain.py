# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Nested values without what only Python can read."""
from typing import Any, Mapping

import numpy as np


def plain(value: Any) -> Any:
    """A copy of nested dicts and lists without what is not a plain value.

    What ``torch.load(weights_only=True)`` reads: str, numbers, None, lists
    and dicts of them. Tuples become lists, numbers of numpy and subclasses
    of str, int and float lose their class, and None takes the place of
    anything else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items() if isinstance(k, (str, int))}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None

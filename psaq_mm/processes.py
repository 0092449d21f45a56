# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One process stops, and all do."""
from contextlib import contextmanager
from typing import Iterator

import torch
from mmengine.dist import all_reduce


@contextmanager
def failing_together() -> Iterator[None]:
    """Let all processes stop where one of them has a loss that is not finite: the
    others would wait for it for ever.

    Raises:
        FloatingPointError: As raised within the block; where it is another
            process's, one that says so.
    """
    try:
        yield
    except FloatingPointError:
        _any_process(True)
        raise
    if _any_process(False):
        raise FloatingPointError('a loss is not finite in another process')


def _any_process(failed: bool) -> bool:
    shared = torch.tensor(float(failed))
    all_reduce(shared, op='max')
    return bool(shared)

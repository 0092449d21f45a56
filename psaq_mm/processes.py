# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Several processes that share one quantization."""
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from torch import Tensor

from psaq_mm.errors import UserError


def indices_of_this_process(count: int) -> range:
    """Every n-th of ``count`` images, for n processes; of some processes none if there are too
    few."""
    return range(get_rank(), count, get_world_size())


def images_of_this_process(images: Tensor) -> Tensor:
    """Every n-th image, for n processes; all of them if there are too few to split."""
    world = get_world_size()
    return images[get_rank()::world] if len(images) >= world else images


def count_of_this_process(count: int) -> int:
    """How many of ``count`` images :func:`images_of_this_process` gives."""
    return len(indices_of_this_process(count)) if count >= get_world_size() else count


def run_images(forward: Callable[[Tensor], Any], images: Tensor, batch_size: int,
               progress: Optional[Callable[[int], None]] = None) -> None:
    """Run a function on the images of this process, without gradients; all processes stop
    where one fails.

    ``images`` are those of all processes, shape (N, C, H, W). ``progress`` is called with the
    number of images of each finished batch.
    """
    with torch.no_grad(), stopping_together():
        for batch in images_of_this_process(images).split(batch_size):
            forward(batch)
            if progress is not None:
                progress(len(batch))


@contextmanager
def stopping_together() -> Iterator[None]:
    """Let all processes stop where one of them fails: the others would wait for it for ever.

    The block must not exchange anything with other processes.

    Raises:
        FloatingPointError: Where another process raised one within its block.
        UserError: Where another process raised another exception.
    """
    try:
        yield
    except FloatingPointError:
        _worst(1)
        raise
    except BaseException:
        _worst(2)
        raise
    worst = _worst(0)
    if worst == 1:
        raise FloatingPointError('a loss is not finite in another process')
    if worst == 2:
        raise UserError('another process stopped; its message says why')


def _worst(status: int) -> int:
    """The largest status of all processes."""
    shared = torch.tensor(float(status))
    all_reduce(shared, op='max')
    return int(shared)

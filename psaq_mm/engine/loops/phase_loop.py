# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the phases of a quantization run have in common."""
from typing import TYPE_CHECKING

from mmengine.runner import BaseLoop

if TYPE_CHECKING:
    from ..runner import PSAQRunner


class PhaseLoop(BaseLoop):
    """A loop without a data loader.

    Args:
        runner (PSAQRunner): The runner.
    """

    runner: 'PSAQRunner'

    def __init__(self, runner: 'PSAQRunner') -> None:
        super().__init__(runner, dataloader=None)

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The phase that makes images."""
from typing import TYPE_CHECKING

from mmengine.runner import BaseLoop
from torch import Tensor

from psaq_mm import api
from psaq_mm.registry import LOOPS

if TYPE_CHECKING:
    from ..runner import PSAQRunner


@LOOPS.register_module()
class SynthesisLoop(BaseLoop):
    """Steps a :class:`Synthesizer` on ``runner.teacher`` until it is done.

    Args:
        runner (PSAQRunner): The runner.
    """

    def __init__(self, runner: 'PSAQRunner') -> None:
        super().__init__(runner, dataloader=None)

    def run(self) -> Tensor:
        """Make the images.

        Returns:
            Tensor: Normalized, shape (num_images, C, H, W); also set as
            ``runner.images``.
        """
        runner = self.runner
        with runner.phase('synthesis'), \
                api.synthesizer(runner.teacher, runner.run_seed,
                                **runner.settings['synthesis']) as images:
            runner.call_hook('before_synthesis', synthesizer=images)
            try:
                while not images.done:
                    losses = images.step()
                    runner.call_hook('after_synthesis_step', synthesizer=images, losses=losses)
            except BaseException:  # Ctrl-C too: keep what is done
                runner.call_hook('interrupt_synthesis', synthesizer=images)
                raise
            runner.images = images.images
            runner.call_hook('after_synthesis', synthesizer=images)
        return runner.images

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The phase that makes images."""
from typing import Any, Dict

import torch
from mmengine.dist import all_gather_object
from torch import Tensor

from psaq_mm import api
from psaq_mm.recipe import SynthesisSettings
from psaq_mm.registry import LOOPS

from .phase_loop import PhaseLoop


def share(settings: Dict[str, Any], rank: int, processes: int) -> Dict[str, Any]:
    """The ``synthesis`` section of one of several processes.

    Args:
        settings (dict): The section.
        rank (int): Number of this process.
        processes (int): How many there are.

    Returns:
        dict: With this process's share of images and of a batch.

    Raises:
        UserError: If there are fewer images than processes.
    """
    whole = SynthesisSettings.from_dict(settings)
    whole.require_images_for(processes)
    count, rest = divmod(whole.num_images, processes)
    return dict(settings, num_images=count + (rank < rest),
                batch_size=-(-whole.batch_size // processes))


@LOOPS.register_module()
class SynthesisLoop(PhaseLoop):
    """Steps a :class:`Synthesizer` on ``runner.teacher`` until it is done."""

    def run(self) -> Tensor:
        """Make the images.

        Returns:
            Tensor: Normalized, shape (num_images, C, H, W); also set as
            ``runner.images``.
        """
        runner = self.runner
        # Each process makes images of its own, from a seed of its own.
        settings = share(runner.settings['synthesis'], runner.rank, runner.world_size)
        with runner.phase('synthesis'), \
                api.synthesizer(runner.teacher, runner.run_seed + runner.rank,
                                **settings) as images:
            runner.call_hook('restore_synthesis', synthesizer=images)
            runner.call_hook('before_synthesis', synthesizer=images)
            try:
                while not images.done:
                    losses = images.step()
                    runner.call_hook('after_synthesis_step', synthesizer=images, losses=losses)
            except BaseException:  # Ctrl-C too: keep what is done
                runner.call_hook('interrupt_synthesis', synthesizer=images)
                raise
            runner.images = torch.cat(all_gather_object(images.images))
            runner.call_hook('after_synthesis', synthesizer=images)
        return runner.images

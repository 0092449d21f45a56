# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The phase that makes images."""
import torch
from mmengine.dist import all_gather_object
from torch import Tensor

from psaq_mm import api
from psaq_mm.recipe import SynthesisSettings
from psaq_mm.registry import LOOPS
from psaq_mm.synthesis import share_of

from .phase_loop import PhaseLoop


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
        settings = runner.settings['synthesis']
        whole = SynthesisSettings.from_dict(settings)
        whole.require_images_for(runner.world_size)
        indices = share_of(whole.num_images, runner.rank, runner.world_size)
        with runner.phase('synthesis'), \
                api.synthesizer(runner.teacher, runner.run_seed, indices,
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

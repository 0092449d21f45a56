# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The points of a quantization run that hooks can act at."""
from typing import TYPE_CHECKING, Any, Dict

from mmengine.hooks import Hook

from psaq_mm.evolution import Evolver
from psaq_mm.pipeline import Progress
from psaq_mm.student import Reconstructor
from psaq_mm.synthesis import Synthesizer

if TYPE_CHECKING:
    from ..runner import PSAQRunner


class PSAQHook(Hook):
    """A hook with the points of :meth:`PSAQRunner.quantize`.

    Subclasses that are listed in ``custom_hooks`` run beside ours.
    """

    def state_dict(self) -> Dict[str, Any]:
        """What the hook would have back in a resumed run: tensors and plain values.
        It is saved after the hooks have acted, by the name of the class."""
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, just before :meth:`before_synthesis` if a run is
        resumed there or later, and before :meth:`before_evolution` if it is resumed there."""

    def before_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        """Before the first step, or the first one that is not done yet."""

    def after_synthesis_step(self, runner: 'PSAQRunner', synthesizer: Synthesizer,
                             losses: Dict[str, float]) -> None:
        """After each step; ``losses`` has the weighted value of each term by name."""

    def interrupt_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        """When an exception, such as Ctrl-C, ends the phase early."""

    def after_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        """After the last step; ``runner.images`` holds the images."""

    def before_allocation(self, runner: 'PSAQRunner', total: int) -> None:
        """Before bits are chosen for a budget, by what ``total`` images show."""

    def after_allocation(self, runner: 'PSAQRunner') -> None:
        """When bits are chosen: ``runner.pipeline.allocation``."""

    def before_calibration(self, runner: 'PSAQRunner', total: int) -> None:
        """Before the first batch of ``total`` images."""

    def after_calibration(self, runner: 'PSAQRunner') -> None:
        """When ``runner.pipeline.student`` is quantized and its ranges are set."""

    def before_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        """Before the first step, or the first one that is not done yet."""

    def after_evolution_step(self, runner: 'PSAQRunner', evolver: Evolver,
                             losses: Dict[str, float]) -> None:
        """After each step; ``round`` is among the losses if it ended a round."""

    def interrupt_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        """When an exception, such as Ctrl-C, ends the phase early."""

    def after_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        """When the student is the student of the best round."""

    def before_final_ranges(self, runner: 'PSAQRunner', total: int) -> None:
        """Before the ranges are set once more; ``total`` images will be run."""

    def after_final_ranges(self, runner: 'PSAQRunner') -> None:
        """When the ranges of the student are its last ones."""

    def before_reconstruction(self, runner: 'PSAQRunner', reconstructor: Reconstructor) -> None:
        """Before the first step, or that of the first block that has not learned yet."""

    def after_reconstruction(self, runner: 'PSAQRunner', reconstructor: Reconstructor) -> None:
        """When all blocks have learned."""

    def before_rounding(self, runner: 'PSAQRunner', total: int) -> None:
        """Before weights are rounded by what ``total`` images give their layers."""

    def after_rounding(self, runner: 'PSAQRunner') -> None:
        """When the weights of the student are their last ones."""

    def after_progress(self, runner: 'PSAQRunner', progress: Progress) -> None:
        """As a phase begins, and after each of its steps or batches: how far it is, and its
        losses."""

    def after_quantize(self, runner: 'PSAQRunner') -> None:
        """When ``quantized.pth`` is written; in the main process alone."""

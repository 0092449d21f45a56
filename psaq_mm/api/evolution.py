# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images and student against each other."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

from torch import Tensor, nn

from psaq_mm.adapters import TapRecord, find_adapter
from psaq_mm.adapters.adapter import module_device
from psaq_mm.evolution import Evolver, Student
from psaq_mm.recipe import EvolutionSettings, SynthesisSettings
from psaq_mm.ops.plan import Plan

from .calibration import require_calibrated
from psaq_mm.synthesis.teacher import float_teacher, frozen


def check_evolution(model: nn.Module, settings: EvolutionSettings, plan: Plan) -> None:
    """Raise if teacher and student cannot be compared so, or the student has nothing
    to learn, before any step.

    Args:
        model (nn.Module): The float model.
        settings (EvolutionSettings): The ``evolution`` section.
        plan (dict): What will be quantized.

    Raises:
        UserError: If the model has none of the taps, or only weights are to be
            learnt and none is quantized.
    """
    if settings.rounds:
        settings.chosen_groups(find_adapter(model).tap_groups(model))
        settings.require_learnable(any('weight' in roles for roles in plan.values()))


@contextmanager
def evolver(student: nn.Module, teacher: nn.Module, images: Tensor, seed: int = 0,
            synthesis: Optional[Mapping[str, Any]] = None,
            **settings: Any) -> Iterator[Evolver]:
    """An :class:`Evolver`, to be stepped within the block.

    Both models are in evaluation mode inside, and as before after it.

    Args:
        student (nn.Module): From :func:`quantize` and :func:`calibrate`.
        teacher (nn.Module): The float model.
        images (Tensor): From :func:`synthesize`, shape (N, C, H, W).
        seed (int): Seed of all randomness. Defaults to 0.
        synthesis (Mapping, optional): The ``synthesis`` section: the prior of
            the images. Defaults to None: its defaults.
        **settings: Of :class:`EvolutionSettings`.

    Raises:
        UserError: If a setting is wrong, or the student is not calibrated.
    """
    chosen = EvolutionSettings.from_dict(settings)
    prior = SynthesisSettings.from_dict(synthesis)
    require_calibrated(student)
    adapter = find_adapter(student)
    groups = chosen.chosen_groups(adapter.tap_groups(student))
    lower, upper = adapter.valid_range(teacher)

    def forward(batch: Tensor, regions: Optional[List[Tensor]]) -> TapRecord:
        return adapter.forward_taps(student, batch, groups, regions)

    with frozen(teacher, student), float_teacher(teacher, prior, groups) as run:
        game = Evolver(chosen, prior, run, Student(student, forward, chosen), images,
                       lower, upper, seed, module_device(teacher))
        try:
            yield game
        finally:
            game.student.require_grad(False)


def evolve(student: nn.Module, teacher: nn.Module, images: Tensor, seed: int = 0,
           synthesis: Optional[Mapping[str, Any]] = None,
           progress: Optional[Callable[[Dict[str, float]], None]] = None,
           **settings: Any) -> nn.Module:
    """Let images and student evolve against each other, in place.

    Args:
        student (nn.Module): From :func:`quantize` and :func:`calibrate`.
        teacher (nn.Module): The float model.
        images (Tensor): From :func:`synthesize`, shape (N, C, H, W).
        seed (int): Seed of all randomness. Defaults to 0.
        synthesis (Mapping, optional): The ``synthesis`` section. Defaults to
            None.
        progress (Callable, optional): Called with the losses of each step.
            Defaults to None.
        **settings: Of :class:`EvolutionSettings`, e.g. ``rounds=10``.

    Returns:
        nn.Module: The student.

    Raises:
        UserError: If a setting is wrong or the student is not calibrated.
        FloatingPointError: If a loss is not finite; the student is then that
            of the step before, or of the best round (:meth:`Evolver.step`).
    """
    with evolver(student, teacher, images, seed, synthesis, **settings) as game:
        while not game.done:
            losses = game.step()
            if progress is not None:
                progress(losses)
        game.finish()
    return student

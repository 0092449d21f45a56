# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Play the teacher-student game on models."""
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, Optional

import torch
from torch import Tensor, nn

from psaq_mm.adapters import TapRecord, find_adapter
from psaq_mm.devices import module_device
from psaq_mm.errors import UserError
from psaq_mm.modes import evaluating
from psaq_mm.ops import named_quant_ops
from psaq_mm.ops.plan import Plan
from psaq_mm.recipe import EvolutionSettings, SynthesisSettings
from psaq_mm.recipe.checks import check_progress
from psaq_mm.student.history import require_pair
from psaq_mm.synthesis.from_model import sized_for
from psaq_mm.synthesis.teacher import float_teacher

from .evolver import Evolver
from .learner import StudentLearner


def check_evolution(model: nn.Module, settings: EvolutionSettings, plan: Plan) -> None:
    """Raise if teacher and student cannot be compared so, or the student has nothing
    to learn, before any step.

    Raises:
        UserError: If the model has none of the taps, or only weights are to be
            learned and none is quantized.
    """
    if settings.rounds:
        settings.chosen_groups(find_adapter(model).tap_groups(model))
        settings.require_learnable(any('weight' in roles for roles in plan.values()))


@contextmanager
def evolver(student: nn.Module, teacher: nn.Module, images: Tensor, settings: EvolutionSettings,
            synthesis: Optional[SynthesisSettings] = None, seed: int = 0) -> Iterator[Evolver]:
    """An :class:`Evolver`, to be stepped within the block.

    The arguments are those of :func:`evolve`.

    Both models are in evaluation mode inside, and as before after it. What the student
    has learned is noted on its ops and quantizers at the end of the block.
    """
    if not settings.rounds:
        raise UserError('psaq_mm.evolve: evolution.rounds is 0, so there is nothing to do; give '
                        "it rounds such as 5, or leave this step out")
    require_pair(student, teacher, images, 'evolve', seed)
    adapter = find_adapter(student)
    groups = settings.chosen_groups(adapter.tap_groups(student))
    lower, upper = adapter.valid_range(teacher)
    prior = sized_for(teacher, synthesis or SynthesisSettings())

    def forward(batch: Tensor, regions: Optional[List[Tensor]]) -> TapRecord:
        return adapter.forward_taps(student, batch, groups, regions)

    with evaluating(teacher, student), float_teacher(teacher, prior, groups) as run:
        learner = StudentLearner(student, forward, settings)
        game = Evolver(settings, prior, run, learner, images, lower, upper, seed,
                       module_device(teacher))
        try:
            yield game
        finally:
            learner.require_grad(False)
            _note_what_was_learned(student, teacher, learner)


def evolve(student: nn.Module, teacher: nn.Module, images: Tensor,
           settings: Optional[EvolutionSettings] = None,
           synthesis: Optional[SynthesisSettings] = None, seed: int = 0,
           progress: Optional[Callable[[Dict[str, float]], None]] = None) -> nn.Module:
    """Let images and student evolve against each other, in place.

    Args:
        student (nn.Module): From :func:`psaq_mm.calibrate`.
        teacher (nn.Module): The float model that it is a copy of.
        images (Tensor): From :func:`psaq_mm.synthesize`, shape (N, C, H, W).
        settings (EvolutionSettings, optional): The rules. Defaults to None: the defaults
            with 5 rounds.
        synthesis (SynthesisSettings, optional): The prior of the images. Defaults to
            None: the defaults.
        seed (int): Seed of all randomness. Defaults to 0.
        progress (Callable, optional): Called with the losses of each step.
            Defaults to None.

    Returns:
        nn.Module: The student.

    Raises:
        UserError: If there are no rounds, the student is not calibrated or its weights are
            rounded already, or the teacher is not its float model.
        FloatingPointError: If a loss is not finite; the student is then that
            of the step before, or of the best round (:meth:`Evolver.step`).
    """
    check_progress(progress)
    settings = settings or EvolutionSettings(rounds=5)
    with evolver(student, teacher, images, settings, synthesis, seed) as game:
        while not game.done:
            losses = game.step()
            if progress is not None:
                progress(losses)
        game.finish()
    return student


def _note_what_was_learned(student: nn.Module, teacher: nn.Module,
                           learner: StudentLearner) -> None:
    """A weight that differs from the teacher's was learned; ranges, if they have moved."""
    weights = dict(teacher.named_parameters(remove_duplicate=False))
    for name, op in named_quant_ops(student):
        if op.weight_quantizer is not None and not torch.equal(
                op.in_own_basis(weights[f'{name}.weight']), op.weight):
            op.weight_settled = True
    for quantizer in learner.quantizers if learner.ranges.moved else ():
        quantizer.learned = True

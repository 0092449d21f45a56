# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the game's loop costs beyond its forward and backward passes.

    OMP_NUM_THREADS=1 python benchmarks/evolution_step.py --core 0

A step of the student, and one of the images, as tools/quantize.py takes them,
against the same passes written down bare: no draws, buffer, optimizer, bounds or
checks. Interleaved in one process, on the demo detector at W4A4.
"""
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict

import torch
from experiment import ROOT, ROUNDS, UNLIMITED, Subject, experiment, quiet
from timing import interleave, median_ratio, pin, timing_parser

import psaq_mm
from psaq_mm.evolution import Evolver, evolver
from psaq_mm.prior import PriorState


def bare_student(game: Evolver, images: torch.Tensor) -> None:
    """The passes of a student step."""
    with torch.no_grad():
        _, taps = game.teacher(images)
    game.student.require_grad(True)
    game.student.discrepancy(taps, images).mean().backward()
    game.student.forget_gradients()


def bare_sample(game: Evolver, images: torch.Tensor) -> None:
    """The passes of a sample step: one of the teacher with two ways back, for the
    two gradients that are compared, and one of the student."""
    game.student.require_grad(False)
    images = images.clone().requires_grad_(True)
    record, taps = game.teacher(images)
    generators = [torch.Generator().manual_seed(i) for i in range(len(images))]
    state = PriorState(images=images, attention=record.attention, generators=generators)
    prior = torch.stack([term(state) for term in game.terms.values()]).sum()
    torch.autograd.grad(prior, images, retain_graph=True)
    term = -torch.log1p(game.student.discrepancy(taps, images)).mean()
    torch.autograd.grad(term, images)


def main() -> None:
    parser = timing_parser(__doc__.split('\n')[0])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'accuracy')
    args = parser.parse_args()
    quiet()
    pin(args.core)
    subject = Subject('demo', args.work_dir)
    recipe = experiment('w4a4', 'backbone', UNLIMITED, ROUNDS).recipe
    images = subject.noise(8, 0, (224, 224))
    student = psaq_mm.calibrate(psaq_mm.prepare(subject.model, recipe.quantization), images)
    total = 4 * (args.rounds + 2)
    for kind, steps, bare in (
            ('student', dict(sample_steps=0, student_steps=total), bare_student),
            ('sample', dict(sample_steps=total, student_steps=0), bare_sample)):
        rules = replace(recipe.evolution, rounds=1, **steps)
        with evolver(student, subject.model, images, rules, recipe.synthesis) as game:
            batch = images[:rules.batch_size]
            sides: Dict[str, Callable[[], object]] = dict(
                step=game.step, bare=lambda game=game, batch=batch, bare=bare: bare(game, batch))
            seconds = interleave(sides, args.rounds)
            print(f'{kind} step, {len(batch)} images: {median_ratio(seconds, "step", "bare"):.3f} '
                  'of its passes alone', flush=True)


if __name__ == '__main__':
    main()

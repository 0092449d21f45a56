# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What each way to quantize keeps, beside the float model, by several seeds.

    python benchmarks/accuracy.py                              # the demo detector
    python benchmarks/accuracy.py --model bccd                 # real photographs, if present
    python benchmarks/accuracy.py --settings w4a4 --rows real32 prior default --scope model
    python benchmarks/accuracy.py --table                      # what is measured so far
    python benchmarks/accuracy.py --table --plot cost.png      # and accuracy against cost

All rows but ``minmax`` and ``paper`` have the quantizer of the preset ``default`` and
differ in the images that ranges are set on, and in what the student then learns:

    noise      8 images of Gaussian noise
    tv         8 images optimised for total variation alone, from clamped noise
    real1      1 training image; real32: 32 of them ("Standard")
    minmax     8 images by the prior, min-max ranges without margin
    v1         8 images by V1's form of the prior (10 points)
    prior      8 images by the prior alone: the preset ``fast``
    real32+    as real32, and then the game's student steps on these images
    paper      the preset ``paper``, with 8 images and 100 steps in a phase
               instead of 32 and 500, and as many student steps as ``default``
    default    the preset ``default``: the prior, then the game

SQNR is that of the backbone's feature maps on real test images. Every value is
kept in a JSON file as soon as it is there; a run that was cut off goes on.
"""
import argparse
import time
from pathlib import Path
from typing import Dict, List, Optional

from experiment import (
    METRICS,
    MIN_MAX,
    MODELS,
    NO_PATCH_SIMILARITY,
    ROOT,
    V1_FORM,
    Results,
    Subject,
    bits_of,
    cell,
    merged,
    quiet,
    rules_of,
)
from torch import nn

NO_GAME = dict(rounds=0)
ROWS = ('noise', 'tv', 'real1', 'real32', 'minmax', 'v1', 'prior', 'real32+', 'paper',
        'default')
NAIVE = dict(activation=dict(margin=0.),
             roles=dict(input=MIN_MAX, attention=dict(MIN_MAX, margin=0.)))


class Rows:
    """Makes the student of a row.

    Args:
        model (str): In ``experiment.MODELS``.
        work_dir (Path): Where images are kept.
    """

    def __init__(self, model: str, work_dir: Path) -> None:
        self.subject = Subject(model, work_dir)
        self._paper: Optional[Subject] = None
        self.work_dir = work_dir

    def student(self, row: str, setting: str, scope: str, seed: int) -> nn.Module:
        """The student of a row; ``seconds`` is the time that it took."""
        subject = self.subject
        quantization = merged(bits_of(setting), dict(scope=scope))
        before = 0.
        evolution: Optional[Dict] = NO_GAME
        synthesis: Dict = {}
        if row == 'noise':
            images = subject.noise(8, seed)
        elif row.startswith('real'):
            images = subject.real_images(int(row[4:].rstrip('+')), seed)
            if row.endswith('+'):
                evolution = dict(sample_steps=0)
        else:
            label = row
            if row == 'tv':
                synthesis = NO_PATCH_SIMILARITY
            elif row == 'v1':
                synthesis = V1_FORM
            elif row == 'paper':
                rules = subject.config.evolution
                subject = self.paper
                label = 'v1'  # the same images: the prior does not depend on the quantizer
                synthesis = dict(V1_FORM, num_images=8, batch_size=8, steps=100)
                evolution = dict(rounds=rules.rounds, sample_steps=rules.sample_steps,
                                 student_steps=rules.student_steps,
                                 batch_size=rules.batch_size)
            elif row == 'minmax':
                quantization, label = merged(quantization, NAIVE), 'prior'
            elif row == 'default':
                evolution, label = None, 'prior'
            images = subject.synthetic(label, seed, **synthesis)
            before = subject.seconds
        start = time.perf_counter()
        student = subject.student(images, seed, quantization=quantization,
                                  evolution=merged(rules_of(setting), evolution or {}),
                                  synthesis=synthesis,
                                  real_size=row.startswith('real'))
        self.seconds = before + time.perf_counter() - start
        return student

    def measure(self, row: str, setting: str, scope: str, seed: int) -> Dict[str, float]:
        """What the student of :meth:`student` keeps, and the seconds it took."""
        student = self.student(row, setting, scope, seed)
        return dict(self.subject.evaluate(student), seconds=self.seconds)

    @property
    def paper(self) -> Subject:
        """Subject: The same model with the settings of the preset ``paper``."""
        if self._paper is None:
            self._paper = Subject(self.subject.name, self.work_dir, 'paper')
        return self._paper


def print_table(results: Results, scope: str, seeds: List[int], settings: List[str],
                rows: List[str]) -> None:
    """A table for each metric, from what is there."""
    float_rows = results.over_seeds([0], 'float')
    for key, (name, _) in METRICS.items():
        if not any(key in value for value in results.values.values()):
            continue
        print(f'\n{name}, scope `{scope}`: mean (lowest to highest seed)\n')
        print(f'| | {" | ".join(s.upper() for s in settings)} |')
        print('|---' * (len(settings) + 1) + '|')
        if key != 'sqnr':
            print(f'| float | {" | ".join([cell(float_rows, key)] * len(settings))} |')
        for row in rows:
            cells = [cell(results.over_seeds(seeds, row, setting, scope), key)
                     for setting in settings]
            if any(cells):
                print(f'| {row} | {" | ".join(cells)} |')
    print(f'\nseconds to quantize, scope `{scope}`, mean over bits and seeds\n')
    print('| | seconds |\n|---|---|')
    for row in rows:
        values = [v['seconds'] for s in settings
                  for v in results.over_seeds(seeds, row, s, scope)]
        if values:
            print(f'| {row} | {sum(values) / len(values):.0f} |')


def plot(results: Results, model: str, scope: str, seeds: List[int], settings: List[str],
         rows: List[str], path: Path) -> None:
    """Draw accuracy against seconds: a panel for each setting, mean and lowest
    to highest seed of each row, the float model as a line."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    key, (name, factor) = next((k, v) for k, v in METRICS.items()
                               if any(k in value for value in results.values.values()))
    figure, panels = pyplot.subplots(1, len(settings), figsize=(1 + 3.2 * len(settings), 3.6),
                                     squeeze=False)
    for axes, setting in zip(panels[0], settings):
        for value in results.over_seeds([0], 'float'):
            axes.axhline(factor * value[key], color='black', linewidth=1, label='float')
        for index, row in enumerate(rows):
            found = results.over_seeds(seeds, row, setting, scope)
            if not found:
                continue
            points = [factor * value[key] for value in found]
            mean = sum(points) / len(points)
            axes.errorbar(sum(v['seconds'] for v in found) / len(found), mean,
                          [[mean - min(points)], [max(points) - mean]], fmt='o', capsize=3,
                          color=f'C{index}', label=row)
        axes.set_xscale('log')
        axes.set_title(f'{model}, {scope}, {setting.upper()}', fontsize=10)
        axes.set_xlabel('seconds to quantize')
    panels[0][0].set_ylabel(name)
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', choices=sorted(MODELS), default='demo')
    parser.add_argument('--settings', nargs='+',
                        default=['w8a8', 'w6a6', 'w4a8', 'w4a4', 'w3a3'])
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS))
    parser.add_argument('--scope', choices=['backbone', 'model'], default='backbone')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'accuracy')
    parser.add_argument('--table', action='store_true', help='measure nothing, print')
    parser.add_argument('--plot', type=Path, metavar='PNG',
                        help='draw accuracy against seconds there')
    args = parser.parse_args()
    quiet()
    results = Results(args.work_dir / f'{args.model}.json')
    if not args.table:
        rows = Rows(args.model, args.work_dir)
        if not results.has('float', 0):
            results.add(rows.subject.evaluate(rows.subject.model), 'float', 0)
        results.fill(args.rows, args.settings, args.scope, args.seeds, rows.measure)
    print(f'{args.model}, seeds {args.seeds}')
    print_table(results, args.scope, args.seeds, args.settings, args.rows)
    if args.plot:
        plot(results, args.model, args.scope, args.seeds, args.settings, args.rows, args.plot)


if __name__ == '__main__':
    main()

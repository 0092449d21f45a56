# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What each way to quantize keeps, beside the float model, by several seeds.

    python benchmarks/accuracy.py                              # the demo detector
    python benchmarks/accuracy.py --model bccd                 # real photographs, if present
    python benchmarks/accuracy.py --settings w4a4 --rows real32 default evolve --scope model
    python benchmarks/accuracy.py --table                      # what is measured so far
    python benchmarks/accuracy.py --table --plot cost.png      # and accuracy against cost

All rows but ``minmax`` and ``paper`` have the range rules of the preset ``default`` and differ
in the images that they are set on, in whether weights that do not learn are rounded by
GPTQ (``real32-gptq`` and what follows it, but for ``paper``) or to nearest, and in what
the student then learns:

    noise      8 images of Gaussian noise
    tv         8 images optimised for total variation alone, from clamped noise
    real1      1 training image; real32: 32 of them ("Standard")
    minmax     8 images by the prior, min-max ranges without margin
    v1         8 images by V1's form of the prior (10 points)
    prior      8 images by the prior, 100 steps in each phase
    real32-gptq, real32+
               as real32, with GPTQ; and with the student steps of ``evolve``
    paper      the preset ``paper``, with 8 images and 100 steps in a phase
               instead of 32 and 500, 5 sample steps in a round, and as many rounds
               and student steps as ``evolve``
    fast, default, double
               8 images by the prior, GPTQ: the presets ``fast`` and ``default``, in a quarter
               and a half of these steps, and as ``default`` on the images of ``prior``
    evolve     the preset ``evolve``: as ``default``, and the student learns from views of these
               images

SQNR is that of the backbone's feature maps on real test images. Every value is
kept in benchmarks/measured as soon as it is there, with a fingerprint of what it was
measured of; a run that was cut off goes on, and what is outdated is measured again.
"""
import argparse
from pathlib import Path
from typing import Callable, Dict, List, Optional

from experiment import (
    METRICS,
    MIN_MAX,
    NO_GAME,
    NO_PATCH_SIMILARITY,
    STEPS,
    V1_FORM,
    Recipe,
    Results,
    Subject,
    add_options,
    add_test_options,
    bits_of,
    cell,
    measured_file,
    merged,
    metrics_of,
    plain,
    quiet,
    rules_of,
)

ROWS = ('noise', 'tv', 'real1', 'real32', 'minmax', 'v1', 'prior', 'real32-gptq', 'real32+',
        'paper', 'fast', 'default', 'double', 'evolve')
AS_SHIPPED = ('real32-gptq', 'real32+', 'fast', 'default', 'double', 'evolve')
NAIVE = dict(activation=dict(margin=0.),
             roles=dict(input=MIN_MAX, attention=dict(MIN_MAX, margin=0.)))


class Rows:
    """Makes the student of a row.

    Args:
        model (str): In ``experiment.MODELS``.
        work_dir (Path): Where images are kept.
        scenes (int): Of :class:`experiment.Subject`. Defaults to 0.
    """

    def __init__(self, model: str, work_dir: Path, scenes: int = 0) -> None:
        self.subject = Subject(model, work_dir, scenes=scenes)
        self._paper: Optional[Subject] = None
        self.work_dir = work_dir

    def recipe(self, row: str, setting: str, scope: str) -> Recipe:
        """How the student of a row is made."""
        recipe = self._recipe(row, setting, scope)
        return recipe if row in AS_SHIPPED else plain(recipe)

    def _recipe(self, row: str, setting: str, scope: str) -> Recipe:
        if row in STEPS:
            return self.subject.shipped(row, setting, scope)
        quantization = merged(bits_of(setting, self.subject.name), dict(scope=scope))
        evolution: Dict = merged(rules_of(setting), NO_GAME)
        if row == 'noise':
            return self.subject.recipe('noise8', quantization, evolution)
        if row.startswith('real'):
            if row.endswith('+'):
                evolution = merged(rules_of(setting), dict(sample_steps=0))
            images = row.replace('-gptq', '').rstrip('+')
            return self.subject.recipe(images, quantization, evolution)
        if row == 'tv':
            return self.subject.recipe('tv', quantization, evolution, NO_PATCH_SIMILARITY)
        if row == 'v1':
            return self.subject.recipe('v1', quantization, evolution, V1_FORM)
        if row == 'paper':
            rules = self.subject.config.evolution
            evolution = merged(rules_of(setting), dict(
                rounds=rules.rounds, sample_steps=5, student_steps=rules.student_steps,
                batch_size=rules.batch_size))
            # The same images as those of v1: the prior does not depend on the quantizer.
            return self.paper.recipe('v1', merged(quantization, NAIVE), evolution,
                                     dict(V1_FORM, num_images=8, batch_size=8))
        if row == 'minmax':
            quantization = merged(quantization, NAIVE)
        return self.subject.recipe('prior', quantization, evolution)

    def measure(self, row: str, recipe: Recipe, seed: int) -> Dict[str, float]:
        """What the student of a row keeps, and the seconds it took."""
        maker = self.paper if row == 'paper' else self.subject
        student, seconds = maker.student(recipe, seed)
        return dict(self.subject.evaluate(student), seconds=seconds)

    @property
    def paper(self) -> Subject:
        """Subject: The same model with the settings of the preset ``paper``."""
        if self._paper is None:
            self._paper = Subject(self.subject.name, self.work_dir, 'paper')
        return self._paper


Found = Callable[[str, str], List[Dict[str, float]]]
"""Row and setting to the values of all seeds that are there."""


def print_table(float_model: Dict[str, float], found: Found, scope: str, settings: List[str],
                rows: List[str], seeds: int) -> None:
    """A table for each metric, from what is there."""
    for key in metrics_of(float_model):
        cells = {row: [cell(found(row, setting), key, seeds) for setting in settings]
                 for row in rows}
        print(f'\n{METRICS[key][0]}, scope `{scope}`: mean (lowest to highest seed)\n')
        print(f'| | {" | ".join(s.upper() for s in settings)} |')
        print('|---' * (len(settings) + 1) + '|')
        if key in float_model:
            print(f'| float | {" | ".join([cell([float_model], key)] * len(settings))} |')
        for row, values in cells.items():
            if any(values):
                print(f'| {row} | {" | ".join(values)} |')
    print(f'\nseconds to quantize, scope `{scope}`, mean over bits and seeds\n')
    print('| | seconds |\n|---|---|')
    for row in rows:
        seconds = [v['seconds'] for s in settings for v in found(row, s)]
        if seconds:
            print(f'| {row} | {sum(seconds) / len(seconds):.0f} |')


def plot(title: str, float_model: Dict[str, float], found: Found, settings: List[str],
         rows: List[str], path: Path) -> None:
    """Draw accuracy against seconds: a panel for each setting, mean and lowest
    to highest seed of each row, the float model as a line."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    key, (name, factor) = next((k, v) for k, v in METRICS.items() if k in float_model)
    figure, panels = pyplot.subplots(1, len(settings), figsize=(2 + 3.2 * len(settings), 3.6),
                                     squeeze=False)
    for axes, setting in zip(panels[0], settings):
        axes.axhline(factor * float_model[key], color='black', linewidth=1, label='float')
        for index, row in enumerate(rows):
            values = found(row, setting)
            if not values:
                continue
            points = [factor * value[key] for value in values]
            mean = sum(points) / len(points)
            axes.errorbar(sum(v['seconds'] for v in values) / len(values), mean,
                          [[mean - min(points)], [max(points) - mean]], fmt='o', capsize=3,
                          color=f'C{index}', label=row)
        axes.set_xscale('log')
        axes.set_title(f'{title}, {setting.upper()}', fontsize=10)
        axes.set_xlabel('seconds to quantize')
    panels[0][0].set_ylabel(name)
    panels[0][-1].legend(fontsize=8, loc='center left', bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add_options(parser, ['w8a8', 'w6a6', 'w4a8', 'w4a4', 'w3a3'])
    add_test_options(parser)
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=list(ROWS))
    parser.add_argument('--plot', type=Path, metavar='PNG',
                        help='draw accuracy against seconds there')
    args = parser.parse_args()
    quiet()
    results = Results(measured_file(args.measured, args.model, args.scenes))
    rows = Rows(args.model, args.work_dir, args.scenes)
    float_model = results.float_model(rows.subject)
    if not args.table:
        results.fill(args.rows, args.settings, args.scope, args.seeds, rows.recipe, rows.measure,
                     next(iter(float_model)))

    def found(row: str, setting: str) -> List[Dict[str, float]]:
        return results.over_seeds(args.seeds, rows.recipe(row, setting, args.scope),
                                  row, setting, args.scope)

    print(f'{args.model}, seeds {args.seeds}')
    print_table(float_model, found, args.scope, args.settings, args.rows,
                len(args.seeds))
    if args.plot:
        plot(f'{args.model}, {args.scope}', float_model, found, args.settings, args.rows,
             args.plot)


if __name__ == '__main__':
    main()

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What each way to quantize keeps, beside the float model, by several seeds.

    python benchmarks/accuracy.py                              # the demo detector
    python benchmarks/accuracy.py --model bccd                 # real photographs, if present
    PSAQ_NUCLEI=DIR python benchmarks/accuracy.py --model nuclei
    python benchmarks/accuracy.py --settings w4a4 --rows real32 default evolve --scope model
    python benchmarks/accuracy.py --table                      # what is measured so far
    python benchmarks/accuracy.py --table --plot cost.png      # and accuracy against cost
    python benchmarks/accuracy.py --rows default mixed --settings w3a3 w4a4 w6a6 --sizes sizes.png

All rows but ``minmax`` and ``paper`` have the range rules of the preset ``default`` and differ
in the images that they are set on, in whether weights that do not learn are rounded by
GPTQ (``noise-gptq`` and what follows it, but for ``paper``) or to nearest, and in what
the student then learns:

    noise      8 images of Gaussian noise
    tv         8 images optimised for total variation alone, from clamped noise
    real1      1 training image; real32: 32 of them ("Standard")
    minmax     8 images by the prior, min-max ranges without margin
    v1         8 images by V1's form of the prior (10 points)
    prior      8 images by the prior, 100 steps in each phase
    noise-gptq, tv-gptq, real32-gptq
               as noise, tv and real32, with all that the preset ``default`` does: narrowed
               channels, GPTQ
    unrelated8 the same on 8 photographs of another domain: of blood cells (BCCD) for the demo
               models, the demo's scenes for BCCD; left out where BCCD is not present
    real32+, real32-blocks
               as real32-gptq, with the student steps of ``evolve``, and with 60 steps of each
               block (``reconstruction``) in their place
    paper      the preset ``paper``, with 8 images and 100 steps in a phase
               instead of 32 and 500, 5 sample steps in a round, and as many rounds
               and student steps as ``evolve``
    fast, default, double
               8 images by the prior, GPTQ: the presets ``fast`` and ``default``, in a quarter
               and a half of these steps, and as ``default`` on the images of ``prior``
    evolve     as ``default``, and the student learns from views of these
               images
    blocks     as ``default``, and each block learns in 60 steps (``reconstruction``)
    mixed      as ``default``, with bits of their own for each module: weights and activations
               have as many as ``default`` on the average, so the size is the same

SQNR is that of the backbone's feature maps on real test images. "With float" is agreement:
ground truth are the float model's classes, or its detections of scores above 0.3. Every
value is kept in benchmarks/measured as soon as it is there, with a fingerprint of what it
was measured of; a run that was cut off goes on, and what is outdated is measured again.
"""
import argparse
import functools
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

from experiment import (
    ALL_STEPS,
    BCCD,
    METRICS,
    MIN_MAX,
    NO_PATCH_SIMILARITY,
    PLAIN,
    ROUNDS,
    V1_FORM,
    Changes,
    Experiment,
    Results,
    Subject,
    add_options,
    add_test_options,
    cell,
    experiment,
    mark_of,
    measured_file,
    metrics_of,
    quiet,
)

from psaq_mm.checkpoint import planned_bytes
from psaq_mm.ops import plan_quantization

PLAIN_SCALES = dict(granularity='per_tensor')
NAIVE: Changes = dict(quantization=dict(
    activation=dict(margin=0.), overrides=dict(_delete_=True),
    roles=dict(input=dict(MIN_MAX, **PLAIN_SCALES, rotate=False),
               attention=dict(MIN_MAX, **PLAIN_SCALES, margin=0.))))
SMALLER_PAPER: Changes = dict(
    synthesis=dict(num_images=8, batch_size=8, steps=100),
    evolution=dict(rounds=5, sample_steps=5, student_steps=20, batch_size=4))

BLOCKS: Changes = dict(reconstruction=dict(steps=60))
"""Each block learns."""


def row(*changes: Changes, **options: str) -> Dict[str, Any]:
    """Arguments of :func:`experiment`, beside the setting and the scope."""
    return dict(options, changes=changes)


ROWS = {
    'noise': row(PLAIN, images='noise8'),
    'tv': row(PLAIN, ALL_STEPS, NO_PATCH_SIMILARITY),
    'real1': row(PLAIN, images='real1'),
    'real32': row(PLAIN, images='real32'),
    'minmax': row(PLAIN, ALL_STEPS, NAIVE),
    'v1': row(PLAIN, ALL_STEPS, V1_FORM),
    'prior': row(PLAIN, ALL_STEPS),
    'noise-gptq': row(images='noise8'),
    'tv-gptq': row(ALL_STEPS, NO_PATCH_SIMILARITY),
    'real32-gptq': row(images='real32'),
    'unrelated8': row(images='unrelated8'),
    'real32+': row(ROUNDS, images='real32'),
    'real32-blocks': row(BLOCKS, images='real32'),
    'paper': row(PLAIN, SMALLER_PAPER, NAIVE, preset='paper'),
    'fast': row(preset='fast'),
    'default': row(),
    'double': row(ALL_STEPS),
    'evolve': row(ROUNDS),
    'blocks': row(BLOCKS),
    'mixed': row()}


def experiment_of(name: str, setting: str, scope: str) -> Experiment:
    """How the student of a row is made."""
    options = dict(ROWS[name])
    if name == 'mixed':
        options['changes'] = (dict(quantization=dict(mean_bits=int(setting[1]))), )
    return experiment(setting, scope, *options.pop('changes'), **options)


Found = Callable[[str, str], List[Dict[str, Any]]]
"""Row and setting to the values of all seeds that are there."""


def print_table(float_model: Dict[str, float], found: Found, scope: str, settings: List[str],
                rows: List[str], seeds: int) -> None:
    """A table for each metric, from what is there."""
    for key in metrics_of(float_model):
        cells = {row: [cell(found(row, setting), key, seeds) for setting in settings]
                 for row in rows}
        if key not in float_model and not any(any(values) for values in cells.values()):
            continue
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
        # Seconds of a busy machine are not kept.
        values = [v for s in settings for v in found(row, s) if 'seconds' in v]
        if values:
            mean = sum(v['seconds'] for v in values) / len(values)
            print(f'| {row} | {mean:.0f}{mark_of(values)} |')


def mean_and_spread(points: Sequence[float]) -> Tuple[float, float, float]:
    """Mean, and how far the lowest and the highest are from it."""
    mean = sum(points) / len(points)
    return mean, mean - min(points), max(points) - mean


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
            values = [v for v in found(row, setting) if 'seconds' in v]
            if not values:
                continue
            mean, below, above = mean_and_spread([factor * value[key] for value in values])
            axes.errorbar(sum(v['seconds'] for v in values) / len(values), mean,
                          [[below], [above]], fmt='o', capsize=3, color=f'C{index}',
                          label=row + mark_of(values))
        axes.set_xscale('log')
        axes.set_title(f'{title}, {setting.upper()}', fontsize=10)
        axes.set_xlabel('seconds to quantize')
    panels[0][0].set_ylabel(name)
    panels[0][-1].legend(fontsize=8, loc='center left', bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def plot_sizes(title: str, subject: Subject, float_model: Dict[str, float], found: Found,
               settings: List[str], scope: str, rows: List[str], path: Path) -> None:
    """Draw accuracy against the size of the checkpoint: mean and lowest to highest seed of each
    row, one point for each setting, the float model as a line."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    key, (name, factor) = next((k, v) for k, v in METRICS.items() if k in float_model)
    sizes = {setting: planned_bytes(subject.model, plan_quantization(
        subject.model, experiment_of('default', setting, scope).recipe.quantization,
        subject.adapter)) / 1e6 for setting in settings}
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.axhline(factor * float_model[key], color='black', linewidth=1, label='float')
    for index, row in enumerate(rows):
        points = [(size, [factor * value[key] for value in found(row, setting) if key in value])
                  for setting, size in sorted(sizes.items(), key=lambda item: item[1])]
        shown = [(size, *mean_and_spread(values)) for size, values in points if values]
        if shown:
            at, means, below, above = zip(*shown)
            axes.errorbar(at, means, [below, above], fmt='o-', capsize=3, color=f'C{index}',
                          label=row)
    for setting, size in sizes.items():
        axes.annotate(setting.upper(), (size, 0.01), xycoords=('data', 'axes fraction'),
                      ha='center', fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel('size of the checkpoint, MB')
    axes.set_ylabel(name)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add_options(parser, ['w8a8', 'w6a6', 'w4a8', 'w4a4', 'w3a3'])
    add_test_options(parser)
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), default=list(ROWS))
    parser.add_argument('--plot', type=Path, metavar='PNG',
                        help='draw accuracy against seconds there')
    parser.add_argument('--sizes', type=Path, metavar='PNG',
                        help='draw accuracy against size there')
    args = parser.parse_args()
    quiet()
    if 'unrelated8' in args.rows and not args.table and not BCCD.exists():
        print(f'unrelated8 is skipped: {BCCD} is not here', file=sys.stderr)
        args.rows.remove('unrelated8')
    results = Results(measured_file(args.measured, args.model, args.scenes))
    subject = Subject(args.model, args.work_dir, args.scenes)
    float_model = results.float_model(subject)
    if not args.table:
        results.fill(args.rows, args.settings, args.scope, args.seeds, experiment_of,
                     subject.measure, next(iter(float_model)))

    @functools.cache
    def found(row: str, setting: str) -> List[Dict[str, Any]]:
        return results.over_seeds(args.seeds, experiment_of(row, setting, args.scope),
                                  row, setting, args.scope)

    print(f'{args.model}, seeds {args.seeds}')
    print_table(float_model, found, args.scope, args.settings, args.rows,
                len(args.seeds))
    results.print_note()
    if args.plot:
        plot(f'{args.model}, {args.scope}', float_model, found, args.settings, args.rows,
             args.plot)
    if args.sizes:
        plot_sizes(f'{args.model}, {args.scope}', subject, float_model, found, args.settings,
                   args.scope, args.rows, args.sizes)


if __name__ == '__main__':
    main()

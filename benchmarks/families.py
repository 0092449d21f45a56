# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""All families: accuracy of the demo models, cost of a sample step at full size.

    python benchmarks/families.py                       # both tables
    python benchmarks/families.py --families upernet    # one family's rows

Accuracy: the small models of demo/, trained by demo/train.py, on the demo's
validation scenes: float, then W8A8 and W4A8 with the ranges of the preset ``default``
from data-free images (100 steps in each phase, one run for each seed) and, with the same
quantizer, from 32 real training images (others for each seed). benchmarks/accuracy.py has more
rows.

Cost: one step of the prior on one image, B=1, for each shipped config at full
size with random weights, against a plain forward and backward pass of the same
backbone; time interleaved in one process, memory in a process for each side.
"""
import argparse
import statistics
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from accuracy import experiment_of
from experiment import METRICS, ROOT, Results, Subject, cell, quiet
from sample_step import sides_of
from timing import interleave, median_ratio, peak_memory_mib, pin, run_in_process, timing_parser

from psaq_mm.adapters import find_adapter
from psaq_mm.engine import build_float_model, load_config

FAMILIES = dict(mask_rcnn='demo', cascade='cascade', upernet='upernet', swin='swin', deit='deit')
"""Family to its model in ``experiment.MODELS``."""

SOURCES = {'data-free': 'prior', '32 real': 'real32'}
"""To rows of ``accuracy.py``."""

FULL_SIZE = [f'{family}_{size}' for family, sizes in (
    ('mask_rcnn_swin', 'ts'), ('retinanet_swin', 't'), ('cascade_mask_rcnn_swin', 'tsb'),
    ('upernet_swin', 'tsb'), ('deit', 'tsb'), ('swin', 'ts')) for size in sizes]


def accuracy(family: str, seeds: Sequence[int], settings: Sequence[str], scope: str,
             work_dir: Path) -> None:
    """Print the rows of a family."""
    results = Results(work_dir / f'families_{family}.json')
    subject = Subject(FAMILIES[family], work_dir)
    float_model = results.float_model(subject)
    names = [key for key in METRICS if key in float_model]

    def print_row(bits: str, source: str, rows: List[Dict[str, float]]) -> None:
        cells = '; '.join(f'{METRICS[name][0]} {cell(rows, name)}' for name in names)
        print(f'| {family} | {bits} | {source} | {cells} |', flush=True)

    print_row('float', '', [float_model])
    for setting in settings:
        for source, row in SOURCES.items():
            results.fill([row], [setting], scope, seeds, experiment_of, subject.measure)
            print_row(setting.upper(), source, results.over_seeds(
                seeds, experiment_of(row, setting, scope), row, setting, scope))


def full_size_sides(name: str) -> Dict[str, Any]:
    """The steps of a shipped config on one image of its default size."""
    torch.manual_seed(0)
    config = load_config(ROOT / 'configs' / f'{name}_w8a8.py')
    model = build_float_model(config)
    sides = sides_of(model, torch.randn(1, 3, *find_adapter(model).image_size(model)))
    return {k: sides[k] for k in ('plain', 'sample')}


def main() -> None:
    parser = timing_parser(__doc__.split('\n')[0])
    parser.add_argument('--families', nargs='*', choices=sorted(FAMILIES), default=list(FAMILIES))
    parser.add_argument('--settings', nargs='+', default=['w8a8', 'w4a8'])
    parser.add_argument('--scope', choices=['backbone', 'model'], default='backbone')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'accuracy')
    parser.add_argument('--no-cost', action='store_true', help='leave out the second table')
    parser.add_argument('--memory-of', nargs=2, metavar=('SIDE', 'CONFIG'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet()
    pin(args.core)
    if args.memory_of:
        work = full_size_sides(args.memory_of[1])[args.memory_of[0]]
        before = peak_memory_mib()
        for _ in range(2):
            work()
        print(peak_memory_mib() - before)
        return
    if args.families:
        print(f'scope {args.scope}, seeds {args.seeds}: mean (lowest to highest seed)\n')
        print('| model | bits | ranges from | metrics |\n|---|---|---|---|', flush=True)
    for family in args.families:
        accuracy(family, args.seeds, args.settings, args.scope, args.work_dir)
    if args.no_cost:
        return
    print('\n| full-size config, one image | sample step, seconds | to a plain pass '
          '| peak MiB | to a plain pass |\n|---|---|---|---|---|')
    for name in FULL_SIZE:
        seconds = interleave(full_size_sides(name), args.rounds)
        memory = {side: float(run_in_process(__file__, '--core', str(args.core),
                                             '--memory-of', side, name)) for side in seconds}
        print(f'| {name} | {statistics.median(seconds["sample"]):.2f} '
              f'| {median_ratio(seconds, "sample", "plain"):.3f} | {memory["sample"]:.0f} '
              f'| {memory["sample"] / memory["plain"]:.3f} |', flush=True)


if __name__ == '__main__':
    main()

# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Models and ways to quantize in one table: means of what accuracy.py and ablation.py kept.

    python benchmarks/brief.py                        # the table of README
    python benchmarks/brief.py --models demo --settings w3a3 --rows minmax prior --sqnr
    python benchmarks/brief.py --against unrelated8   # another row less the default, in words

Rows are those of accuracy.py, or variants of ablation.py. ``-`` is not measured, ``†`` before
version 0.3. Nothing is measured here.
"""
import argparse
import statistics
from typing import Any, Dict, List, Optional

from ablation import experiment_of as variant_of
from accuracy import ROWS, experiment_of
from experiment import (
    MEASURED,
    METRICS,
    Experiment,
    Results,
    mark_of,
    measured_file,
    metrics_of,
    print_note_once,
    quiet,
)

TITLES = dict(demo='Demo detector', upernet='Demo segmentor', bccd='BCCD detector',
              nuclei='Nuclei detector')
NAMES = {'default': 'data-free (default)', 'noise-gptq': 'Gaussian noise',
         'tv-gptq': 'total variation', 'unrelated8': '8 unrelated photographs',
         'real32-gptq': '32 real images'}
SEEDS = (0, 1, 2)


def made_by(row: str, setting: str, scope: str) -> Experiment:
    """How the student of a row of either script is made."""
    return (experiment_of if row in ROWS else variant_of)(row, setting, scope)


class Model:
    """What is kept of a model."""

    def __init__(self, name: str, scenes: int) -> None:
        self.title = TITLES[name]
        self.results = Results(measured_file(MEASURED, name, scenes))
        self.float = self.results.get(None, 'float') or {}
        self.keys = [k for k in metrics_of(self.float) if k in self.float]
        self.metric = ' / '.join(METRICS[k][0] for k in self.keys).replace(' AP /', ' /')

    def found(self, row: str, setting: str, scope: str) -> List[Dict[str, Any]]:
        """Values of all seeds."""
        made = made_by(row, setting, scope)
        return self.results.over_seeds(SEEDS, made, row, setting, scope)

    def mean(self, row: str, setting: str, scope: str) -> Optional[List[float]]:
        """Metrics in points, means over seeds; None where a seed is missing."""
        found = self.found(row, setting, scope)
        if len(found) < len(SEEDS) or any(k not in value for value in found for k in self.keys):
            return None
        return [statistics.mean(METRICS[k][1] * value[k] for value in found) for k in self.keys]

    def cell(self, row: str, setting: str, scope: str, more: str) -> str:
        """Means of a row: ``62.3 / 59.8, 14.1 dB`` or ``62.3 / 59.8, 68.3 / 70.7 alike``."""
        found = self.found(row, setting, scope)
        parts = []
        agreement = [key for key in METRICS if key.startswith('agreement')
                     and any(key in value for value in found)]
        for keys, unit in ((self.keys, ''), (['sqnr'] if more == 'sqnr' else [], ' dB'),
                           (agreement if more == 'agreement' else [], ' alike')):
            values = [[METRICS[k][1] * v[k] for v in found if k in v] for k in keys]
            if values and all(values):
                parts.append(' / '.join(f'{statistics.mean(v):.1f}' for v in values) + unit)
        if not parts:
            return '-'
        few = f' ({len(found)} of {len(SEEDS)} seeds)' if len(found) < len(SEEDS) else ''
        return ', '.join(parts) + few + mark_of(found)


def print_table(models: List[Model], settings: List[str], rows: List[str], scope: str,
                more: str) -> None:
    """A line for each model at each setting, a column for each row; none where nothing is
    measured."""
    print(f'| | bits | float | {" | ".join(NAMES.get(row, f"`{row}`") for row in rows)} |')
    print('|---' * (len(rows) + 3) + '|')
    for model in models:
        whole = ' / '.join(f'{METRICS[k][1] * model.float[k]:.1f}' for k in model.keys)
        for setting in settings:
            cells = [model.cell(row, setting, scope, more) for row in rows]
            if set(cells) == {'-'}:
                continue
            print(f'| {model.title}, {model.metric} | {setting.upper()} | {whole} | '
                  f'{" | ".join(cells)} |')


def print_differences(models: List[Model], settings: List[str], other: str, scope: str) -> None:
    """A sentence: by how many points another row is above or below the default."""
    parts = []
    for model in models:
        at = []
        for setting in settings:
            ours, theirs = (model.mean(row, setting, scope) for row in ('default', other))
            if ours and theirs:
                points = ' / '.join(f'{b - a:+.1f}' for a, b in zip(ours, theirs))
                at.append(f'{points} at {setting.upper()}')
        if not at:
            continue
        parts.append(f'{model.title} ({model.metric}) {", ".join(at)}')
    print(f'Points gained or lost with {NAMES.get(other, other)} in the place of data-free '
          f'images: {"; ".join(parts)}.')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--models', nargs='+', choices=list(TITLES), default=list(TITLES))
    parser.add_argument('--settings', nargs='+', default=['w8a8', 'w4a4', 'w3a3'])
    parser.add_argument('--rows', nargs='+', default=list(NAMES))
    parser.add_argument('--scope', choices=['backbone', 'model'], default='backbone')
    parser.add_argument('--scenes', type=int, default=0)
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument('--sqnr', dest='more', action='store_const', const='sqnr', default='',
                        help='of feature maps, beside')
    beside.add_argument('--agreement', dest='more', action='store_const', const='agreement',
                        help='with what the float model decides, beside')
    parser.add_argument('--against', metavar='ROW', help='print how it differs from the default')
    args = parser.parse_args()
    quiet()
    models = [Model(name, args.scenes) for name in args.models]
    print(f'scope `{args.scope}`, means of seeds {SEEDS}')
    if args.against:
        print_differences(models, args.settings, args.against, args.scope)
    else:
        print_table(models, args.settings, args.rows, args.scope, args.more)
    print_note_once(model.results for model in models)


if __name__ == '__main__':
    main()

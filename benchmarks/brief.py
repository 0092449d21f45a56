# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Models and ways to quantize in one table: means of what accuracy.py and ablation.py kept.

    python benchmarks/brief.py                        # the table of README
    python benchmarks/brief.py --models demo --settings w3a3 --rows minmax prior --sqnr
    python benchmarks/brief.py --rows noise-gptq --minus default      # less another row, or float

Rows are those of accuracy.py, or variants of ablation.py. ``-`` is not measured, ``†`` before
version 0.3. Nothing is measured here.
"""
import argparse
import statistics
from typing import Any, Dict, List

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

    def cell(self, row: str, setting: str, scope: str, more: str, minus: str) -> str:
        """Means of a row: ``62.3 / 59.8, 14.1 dB`` or ``62.3 / 59.8, 68.3 / 70.7 alike``; less
        those of another row: ``-0.3 / +0.1``."""
        found = self.found(row, setting, scope)
        others: List[Dict[str, Any]] = []
        if minus:
            others = [self.float] if minus == 'float' else self.found(minus, setting, scope)
            if not others:
                return '-'
        parts = []
        agreement = [key for key in METRICS if key.startswith('agreement')
                     and any(key in value for value in found)]
        for keys, unit in ((self.keys, ''), (['sqnr'] if more == 'sqnr' else [], ' dB'),
                           (agreement if more == 'agreement' else [], ' alike')):
            values = [[METRICS[k][1] * v[k] for v in found if k in v] for k in keys]
            if not values or not all(values):
                continue
            means = [statistics.mean(v) for v in values]
            if minus:
                means = [mean - statistics.mean(METRICS[k][1] * v[k] for v in others)
                         for mean, k in zip(means, keys)]
            parts.append(' / '.join(f'{round(mean, 1) + 0:{"+" if minus else ""}.1f}'
                                    for mean in means) + unit)
        if not parts:
            return '-'
        few = f' ({len(found)} of {len(SEEDS)} seeds)' if len(found) < len(SEEDS) else ''
        return ', '.join(parts) + few + mark_of([*found, *others])


def print_table(models: List[Model], settings: List[str], rows: List[str], scope: str,
                more: str, minus: str) -> None:
    """A line for each model at each setting, a column for each row; none where nothing is
    measured."""
    print(f'| | bits | float | {" | ".join(NAMES.get(row, f"`{row}`") for row in rows)} |')
    print('|---' * (len(rows) + 3) + '|')
    for model in models:
        whole = ' / '.join(f'{METRICS[k][1] * model.float[k]:.1f}' for k in model.keys)
        for setting in settings:
            cells = [model.cell(row, setting, scope, more, minus) for row in rows]
            if set(cells) == {'-'}:
                continue
            print(f'| {model.title}, {model.metric} | {setting.upper()} | {whole} | '
                  f'{" | ".join(cells)} |')


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
    beside.add_argument('--minus', metavar='ROW', default='', help='print points above or below '
                        'another row, or below float')
    args = parser.parse_args()
    quiet()
    models = [Model(name, args.scenes) for name in args.models]
    print(f'scope `{args.scope}`, means of seeds {SEEDS}')
    print_table(models, args.settings, args.rows, args.scope, args.more, args.minus)
    print_note_once(model.results for model in models)


if __name__ == '__main__':
    main()

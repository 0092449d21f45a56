# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Two runs side by side."""
from typing import Any, Dict, List, Mapping, Tuple

from PIL import Image

from .page import charts, fill_in
from .pictures import embedded
from .reading import Run
from .summary import figures

Row = Tuple[str, str, str]
"""What is compared, and what it is in each run."""


def flat(values: Mapping[str, Any], prefix: str = '') -> Dict[str, Any]:
    """Nested mappings as one, of dotted keys."""
    found: Dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f'{prefix}{key}.'))
        else:
            found[f'{prefix}{key}'] = value
    return found


def differences(a: Run, b: Run) -> Tuple[List[Row], List[Row]]:
    """Numbers of two runs, and what was done differently: settings, seed, images, checkpoint,
    device and versions."""
    ours, theirs = figures(a.report), figures(b.report)
    numbers = [(name, _shown(ours.get(name)), _shown(theirs.get(name)))
               for name in dict.fromkeys((*ours, *theirs))]
    done = [flat(dict(run.report['settings'], versions=run.report['versions'], **{
        key: run.report.get(key) for key in ('seed', 'device', 'images', 'checkpoint')}))
        for run in (a, b)]
    changes = [(key, *_sides(key, *done))
               for key in dict.fromkeys((*done[0], *done[1]))
               if done[0].get(key) != done[1].get(key)]
    return numbers, changes


def _sides(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Tuple[str, str]:
    one, other = (str(done[key]) if key in done else '(not set)' for done in (ours, theirs))
    return one, other


def _shown(value: Any) -> str:
    if value is None:
        return 'not measured'
    return f'{value:.4g}' if abs(value) < 1000 else f'{value:.0f}'


def names_of(a: Run, b: Run) -> Tuple[str, str]:
    """What the runs are called: two names that differ."""
    return (a.name, b.name) if a.name != b.name else (f'{a.name} (A)', f'{b.name} (B)')


def compare_page(a: Run, b: Run) -> str:
    """A page with two runs in the same charts.

    Returns:
        str: HTML.
    """
    names = names_of(a, b)
    numbers, changes = differences(a, b)
    sheets = []
    for name, run in zip(names, (a, b)):
        if run.sheet is not None:
            with Image.open(run.sheet) as sheet:
                sheets.append((name, embedded(sheet, 720)))
    return fill_in('compare.html', title=f'{names[0]} and {names[1]}', names=names,
                   numbers=numbers, changes=changes, sheets=sheets,
                   **charts(dict(zip(names, (a.report, b.report)))))

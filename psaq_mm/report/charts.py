# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The charts of a report: what is in ``report.json``, drawn.

Each takes runs by name, one or two, and gives SVG; an empty text where there is nothing
to draw.
"""
import math
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from matplotlib.ticker import LogLocator, NullFormatter

from .modules import KINDS, kind_of, part_of, spans
from .summary import duration
from .svg import COLORS, Drawing

Runs = Mapping[str, Mapping[str, Any]]
POINTS = 300
"""Longer curves are drawn by means of their steps."""


def _curve(values: Sequence[float]) -> Tuple[List[float], List[float]]:
    """Steps, from 1, and values."""
    width = max(1, math.ceil(len(values) / POINTS))
    parts = [[v for v in values[i:i + width] if v is not None]
             for i in range(0, len(values), width)]
    kept = [(i * width + (width + 1) / 2, sum(part) / len(part))
            for i, part in enumerate(parts) if part]
    return [x for x, _ in kept], [y for _, y in kept]


def _plot(axes: Any, values: Sequence[float], **options: Any) -> None:
    axes.plot(*_curve(values), marker='o' if len(values) < 12 else '', markersize=3, **options)


_LOSSES = {
    '': ('Images: the prior', 'step', 'total'),
    'sample': ('Images that compete with the student', 'step', 'total'),
    'student': ('Student: distance from the float model', 'step', 'discrepancy'),
    'round': ('The same after each round', 'round (0: as calibrated)', 'discrepancy')}
"""Kind of losses to the title and the unit of their steps, and the one that two runs are
compared by."""


def _log_axis(axes: Any) -> None:
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter('{x:g}')
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter('{x:g}' if high < 100 * low else NullFormatter())


def loss_chart(runs: Runs) -> str:
    """The terms of the prior, and in the game what images and student lose."""
    several = len(runs) > 1
    curves: Dict[str, Dict[str, List[float]]] = {kind: {} for kind in _LOSSES}
    for run, report in runs.items():
        for name, values in report['losses'].items():
            kind, _, term = name.rpartition('/')
            if values and kind in curves and (not several or term == _LOSSES[kind][2]) \
                    and term != 'adversarial_factor':
                curves[kind][run if several else term.replace('_', ' ')] = values
    panels = [(kind, found) for kind, found in curves.items() if found]
    if not panels:
        return ''
    with Drawing([2.2] * len(panels)) as (drawing, all_axes):
        for axes, (kind, found) in zip(all_axes, panels):
            title, unit, _ = _LOSSES[kind]
            axes.set_title(title)
            axes.set_xlabel(unit)
            axes.set_ylabel('loss')
            for name, values in found.items():
                if kind == 'round':
                    axes.plot(range(len(values)), values, marker='o', markersize=3, label=name)
                else:
                    _plot(axes, values, label=name)
            if len(found) > 1:
                axes.legend(ncols=4, loc='upper center', bbox_to_anchor=(.5, -.28))
            ends = [v for values in found.values() for v in values if v is not None]
            if min(ends) > 0 and max(ends) > 30 * min(ends):
                _log_axis(axes)
            axes.xaxis.get_major_locator().set_params(integer=True)
    return drawing.svg


def block_chart(runs: Runs) -> str:
    """Error of each block before and after it learned."""
    blocks = {(run, name.partition('/')[2]): values for run, report in runs.items()
              for name, values in report['losses'].items()
              if name.startswith('reconstruction/') and values}
    if not blocks:
        return ''
    names = list(dict.fromkeys(name for _, name in blocks))
    with Drawing([.9 + .18 * len(names)]) as (drawing, (axes, )):
        for number, run in enumerate(runs):
            for (owner, name), values in blocks.items():
                if owner != run:
                    continue
                some = max(1, len(values) // 10)
                ends = sum(values[:some]) / some, sum(values[-some:]) / some
                y = names.index(name) + .25 * number
                axes.plot([100 * e for e in ends], [y, y], color=COLORS[number], alpha=.5)
                axes.plot(100 * ends[1], y, 'o', color=COLORS[number], markersize=4)
        axes.set_yticks(range(len(names)), [name.replace('backbone.', '') for name in names])
        axes.invert_yaxis()
        axes.set_xlabel('relative error of a block, % (dot: after it learned)')
    return drawing.svg


def _shade_parts(axes: Any, entries: Sequence[Mapping[str, Any]], named: bool) -> None:
    """Tell the parts of a model apart along the axis of its modules."""
    for number, (part, first, last) in enumerate(spans([part_of(e['name']) for e in entries])):
        if number % 2:
            axes.axvspan(first - .5, last + .5, color='#888888', alpha=.12, linewidth=0)
        if named and last - first + 1 >= .011 * len(part) * len(entries):
            axes.text((first + last) / 2, 1.01, part, ha='center', va='bottom', fontsize=8,
                      transform=axes.get_xaxis_transform())
    axes.set_xlim(-.5, len(entries) - .5)
    axes.set_xticks([])
    axes.grid(axis='x', visible=False)


def module_chart(runs: Runs, key: str, label: str, factor: float = 1., log: bool = False) -> str:
    """A number of each module, in the order of the model.

    Args:
        runs (Mapping): Of one run modules are coloured by kind, of two by run.
        key (str): Of an entry in ``modules``.
        label (str): Of the axis, with the unit.
        factor (float): What values are multiplied by. Defaults to 1.
        log (bool): Whether the axis is logarithmic; 0 is then left out. Defaults to False.
    """
    entries = max((report['modules'] for report in runs.values()), key=len)
    places = {entry['name']: i for i, entry in enumerate(entries)}
    groups: Dict[str, List[Tuple[int, float]]] = {}
    for run, report in runs.items():
        for entry in report['modules']:
            value = entry.get(key)
            if value is not None and entry['name'] in places and (value > 0 or not log):
                group = run if len(runs) > 1 else kind_of(entry)
                groups.setdefault(group, []).append((places[entry['name']], factor * value))
    if not groups:
        return ''
    with Drawing([2.7]) as (drawing, (axes, )):
        _shade_parts(axes, entries, named=True)
        order = list(runs) if len(runs) > 1 else KINDS
        for number, group in enumerate(order):
            if group in groups:
                x, y = zip(*groups[group])
                axes.plot(x, y, '.', color=COLORS[number], label=group,
                          markersize=7 if len(entries) < 120 else 5)
        if log:
            _log_axis(axes)
        axes.set_ylabel(label)
        axes.set_xlabel('modules, from input to output')
        drawing.figure.legend(loc='outside lower center', ncols=3, handletextpad=.1)
    return drawing.svg


def range_chart(runs: Runs) -> str:
    """The range of each quantizer of one run, as a bar from its lower to its upper end."""
    entries = next(iter(runs.values()))['modules']
    panels: Dict[str, List[Tuple[float, float, float, str]]] = {}
    for i, entry in enumerate(entries):
        roles = [role for role in entry['tensors'] if role != 'weight']
        for role, tensor in entry['tensors'].items():
            shift = 0. if role == 'weight' else (roles.index(role) + .5) / len(roles) - .5
            panel = 'Weights' if role == 'weight' else 'Activations'
            panels.setdefault(panel, []).append(
                (i + shift, tensor['lower'], tensor['upper'], role))
    shown = [name for name in ('Weights', 'Activations') if name in panels]
    roles = list(dict.fromkeys(bar[3] for bar in panels.get('Activations', [])))
    with Drawing([2.] * len(shown)) as (drawing, all_axes):
        for number, (axes, name) in enumerate(zip(all_axes, shown)):
            _shade_parts(axes, entries, named=not number)
            for role in roles if name == 'Activations' else ['weight']:
                bars = [bar for bar in panels[name] if bar[3] == role]
                color = COLORS[roles.index(role) % len(COLORS)] if role in roles else COLORS[-1]
                axes.vlines(*zip(*((x, low, high) for x, low, high, _ in bars)), color=color,
                            linewidth=2 if len(entries) < 120 else 1.1, label=role)
            ends = sorted(abs(end) for bar in panels[name] for end in bar[1:3] if end)
            # A power of ten: ticks within the linear part would lie on each other.
            decade = math.floor(math.log10(max(ends[len(ends) // 4], 1e-6)))
            axes.set_yscale('symlog', linthresh=10.**decade)
            axes.yaxis.set_major_formatter('{x:g}')
            axes.set_ylabel(f'{name.lower()}, real values')
            axes.axhline(0, color='#888888', linewidth=.6)
        all_axes[-1].set_xlabel('modules, from input to output')
        if roles:
            drawing.figure.legend(*all_axes[-1].get_legend_handles_labels(), ncols=5,
                                  loc='outside lower center')
    return drawing.svg


def cost_chart(runs: Runs) -> str:
    """Seconds and peak memory of each phase."""
    phases = list(dict.fromkeys(p for report in runs.values() for p in report['seconds']))
    kinds = [kind for kind in ('process', 'gpu') if any(
        kind in peaks for report in runs.values()
        for peaks in (report.get('memory') or {}).values())]
    height = .62 + len(phases) * max(.24, .2 * len(runs))
    with Drawing([height] * (1 + len(kinds))) as (drawing, all_axes):
        for number, (run, report) in enumerate(runs.items()):
            memory = report.get('memory') or {}
            columns = [report['seconds']] + [{phase: peaks[kind] / 1e6 for phase, peaks in
                                              memory.items() if kind in peaks} for kind in kinds]
            thick = .7 / len(runs)
            for axes, values in zip(all_axes, columns):
                kept = [phase for phase in phases if phase in values]
                bars = axes.barh(
                    [phases.index(phase) + (number - (len(runs) - 1) / 2) * thick
                     for phase in kept], [values[phase] for phase in kept], thick * .92,
                    color=COLORS[number], label=run)
                axes.bar_label(bars, padding=3, fontsize=8, labels=[
                    duration(values[phase]) if axes is all_axes[0]
                    else f'{values[phase]:.0f} MB' for phase in kept])
        names = dict(process='peak memory of the process, MB', gpu='peak memory on the GPU, MB')
        for axes, label in zip(all_axes, ['seconds'] + [names[kind] for kind in kinds]):
            axes.set_yticks(range(len(phases)), [phase.replace('_', ' ') for phase in phases])
            axes.invert_yaxis()
            axes.margins(x=.16)
            axes.set_xlabel(label)
            axes.grid(axis='y', visible=False)
        if len(runs) > 1:
            drawing.figure.legend(*all_axes[0].get_legend_handles_labels(), ncols=2,
                                  loc='outside lower center')
    return drawing.svg

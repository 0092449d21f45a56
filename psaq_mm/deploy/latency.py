# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Measure the latency of several ways to run a model, in turn."""
import os
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import torch

from psaq_mm.errors import UserError

COLUMNS = (('side', 'side', '{}'), ('median_ms', 'median ms', '{:.1f}'),
           ('p90_ms', 'p90 ms', '{:.1f}'), ('images_per_second', 'images/s', '{:.2f}'),
           ('speed', 'x torch fp32', '{:.2f}'), ('peak_mib', 'peak MiB', '{:.0f}'),
           ('megabytes', 'file MB', '{:.2f}'), ('metric', 'accuracy', '{}'))
"""Key of a row, its heading, and how it is printed."""


def pin(threads: int) -> None:
    """Bind this process to as many cores as there are threads.

    Raises:
        UserError: If there are not enough cores.
    """
    if threads < 1:
        raise UserError(f'--threads must be 1 or more, got {threads}')
    if hasattr(os, 'sched_getaffinity'):
        cores = sorted(os.sched_getaffinity(0))
        if threads > len(cores):
            raise UserError(f'--threads {threads}: this process may use {len(cores)} cores')
        os.sched_setaffinity(0, set(cores[-threads:]))
    torch.set_num_threads(threads)


def interleave(sides: Dict[str, Callable[[], Any]], rounds: int,
               warmup: int = 2) -> Dict[str, List[float]]:
    """Measure all sides in turn, so that all see the same load of the machine.

    Args:
        sides (dict): Name to a function that does the work once.
        rounds (int): Number of measured rounds.
        warmup (int): Number of rounds before them. Defaults to 2.

    Returns:
        dict[str, list[float]]: Seconds of each round.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in sides}
    for index in range(warmup + rounds):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: Dict[str, List[float]], baseline: str) -> List[Dict[str, Any]]:
    """Make one row for each side: latency, throughput, and the median over rounds
    of its speed relative to the baseline."""
    rows = []
    for side, values in seconds.items():
        ordered = sorted(values)
        rows.append(dict(
            side=side, median_ms=1e3 * statistics.median(values),
            p90_ms=1e3 * ordered[min(len(ordered) - 1, int(.9 * len(ordered)))],
            images_per_second=1 / statistics.median(values),
            speed=statistics.median(b / a for a, b in zip(values, seconds[baseline]))))
    return rows


def table(rows: Sequence[Dict[str, Any]]) -> str:
    """Format the rows as a Markdown table."""
    lines = ['| ' + ' | '.join(heading for _, heading, _ in COLUMNS) + ' |',
             '|' + '---|' * len(COLUMNS)]
    for row in rows:
        cells = ['' if row.get(key) is None else form.format(row[key]) for key, _, form in COLUMNS]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(rows: Sequence[Dict[str, Any]], title: str, path: Path) -> None:
    """Draw the latencies as bars, and save the picture."""
    from io import BytesIO

    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    from psaq_mm.checkpoint import save_bytes
    names = [row['side'] for row in rows][::-1]
    values = [row['median_ms'] for row in rows][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.4 * len(rows)))
    bars = axes.barh(names, values, color=['#4c72b0' if 'int8' in n else '#b0b0b0' for n in names])
    axes.bar_label(bars, fmt='%.1f', padding=3)
    axes.set_xlabel('median latency of one image, ms')
    axes.set_title(title, fontsize=10)
    figure.tight_layout()
    buffer = BytesIO()
    figure.savefig(buffer, format='png', dpi=120)
    pyplot.close(figure)
    save_bytes(buffer.getvalue(), path)

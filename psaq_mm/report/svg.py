# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Figures of matplotlib as SVG that stands within a page, in the page's own colours."""
import io
import re
from typing import Any, Dict, List, Tuple

import matplotlib
from cycler import cycler
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLORS = ('#3f88c5', '#e07a2f', '#3a9d6e', '#a267b8', '#c9495b', '#8a8a3c')
"""Told apart on white and on black, and by most who are colour-blind."""

_INK = '#123456'  # becomes currentColor
_STYLE: Dict[Any, Any] = {
    'svg.fonttype': 'none', 'font.family': 'sans-serif', 'font.size': 9, 'axes.labelsize': 9,
    'legend.fontsize': 8.5, 'xtick.labelsize': 8.5, 'ytick.labelsize': 8.5,
    'axes.titlesize': 9.5, 'axes.titleweight': 'bold', 'axes.titlelocation': 'left',
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
    'grid.alpha': .18, 'grid.linewidth': .6, 'axes.axisbelow': True, 'lines.linewidth': 1.3,
    'axes.linewidth': .6, 'legend.frameon': False, 'legend.handlelength': 1.2,
    'legend.columnspacing': 1.2, 'axes.prop_cycle': cycler(color=COLORS),
    'figure.facecolor': 'none', 'axes.facecolor': 'none',
    **{f'{name}color': _INK for name in ('text.', 'axes.label', 'xtick.', 'ytick.', 'grid.')},
    'axes.edgecolor': _INK}
WIDTH = 5.4
"""Inches: wide enough for a screen, and readable on a phone."""


class Drawing:
    """A figure of one column of axes, to be drawn within a ``with`` block.

    Args:
        heights (list[float]): Inches of each axes.
        **options (Any): Of ``Figure.subplots``.
    """

    def __init__(self, heights: List[float], **options: Any) -> None:
        self.context = matplotlib.rc_context(_STYLE)
        self.heights, self.options = heights, options
        self.svg = ''

    def __enter__(self) -> Tuple['Drawing', List[Any]]:
        self.context.__enter__()
        self.figure = Figure(figsize=(WIDTH, sum(self.heights)), layout='constrained')
        axes = self.figure.subplots(len(self.heights), squeeze=False, gridspec_kw=dict(
            height_ratios=self.heights), **self.options)
        return self, list(axes.flat)

    def __exit__(self, kind: Any, *args: Any) -> None:
        try:
            if kind is None:
                self.svg = self._render()
        finally:
            self.context.__exit__(kind, *args)

    def _render(self) -> str:
        """The same bytes for the same figure: no date, no random names."""
        file = io.StringIO()
        with matplotlib.rc_context({'svg.hashsalt': 'psaq_mm'}):
            FigureCanvasSVG(self.figure).print_svg(file, metadata=dict(
                Date=None, Creator=None, Format=None, Type=None))
        text = file.getvalue()
        text = text[text.index('<svg'):].replace(_INK, 'currentColor')
        text = re.sub(r'(\d+\.\d{2})\d+', r'\1', text)
        # Of all points of one picture the page has one font.
        text = re.sub(r"font: (?:([\w ]+) )?([\d.]+)px [^;\"]+", r'font: \1 \2px sans-serif', text)
        return re.sub(r'<metadata>.*?</metadata>\s*', '', text, flags=re.DOTALL)

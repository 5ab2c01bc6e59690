"""Panels as an SVG file: the same bytes for the same numbers, text as text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from spectreg_lab.exhibits.exhibit import Line, Panel, has_band

STYLE: Any = {
    "svg.hashsalt": "spectreg",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9.5,
    "lines.linewidth": 1.3,
}
STROKES: dict[str, Any] = {"solid": "-", "dashed": (0, (5, 2)), "dotted": (0, (1, 1.6))}
MARKERS = {"circle": "o", "diamond": "D", "line": "_", "square": "s"}
MANY = 300  # a range of this many times has ticks enough at the powers of ten
WIDTH, HEIGHT, LEGEND, HEAD = 4.0, 2.7, 0.55, 0.2  # inches


def _draw_line(axes: Axes, line: Line, colour: str) -> None:
    if line.marker:
        axes.plot(line.x, line.y, MARKERS[line.marker], color=colour, markersize=4, alpha=0.85, clip_on=False)
        return
    axes.plot(line.x, line.y, color=colour, linestyle=STROKES[line.dash])
    if has_band(line):
        axes.fill_between(line.x, line.low or 0, line.high or 0, color=colour, alpha=0.1, linewidth=0)


def _log_ticks(axes: Axes) -> None:
    """0.02, 0.05, 0.1 …, or powers of ten only where there are many."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < MANY else (1,)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    for line in panel.lines:
        _draw_line(axes, line, colours[line.method])
    axes.set_title(panel.title, loc="left", y=1.02)  # matplotlib takes long to find a place by itself
    if panel.ticks:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        axes.set_xlim(-0.5, len(panel.ticks) - 0.5)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    if panel.log:
        _log_ticks(axes)
    axes.margins(x=0.15 if panel.lines and panel.lines[0].marker else 0.02)


def _legend(figure: Figure, panels: Sequence[Panel], colours: Mapping[str, str], dashes: Mapping[str, str]) -> None:
    methods = dict.fromkeys(line.method for panel in panels for line in panel.lines)
    handles = [Line2D([], [], color=colours[method], label=method) for method in methods]
    handles += [Line2D([], [], color="0.35", linestyle=STROKES[dash], label=name) for dash, name in dashes.items()]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 4), frameon=False)


def svg(panels: Sequence[Panel], colours: Mapping[str, str], dashes: Mapping[str, str]) -> str:
    """Draw ``panels`` in a grid above one legend."""
    columns = min(len(panels), 2 if len(panels) <= 4 else 4)
    rows = -(-len(panels) // columns)
    height = rows * HEIGHT + LEGEND + HEAD
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(columns * WIDTH, height))
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel, colours)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        bottom = (LEGEND + 0.5) / height
        figure.subplots_adjust(
            0.72 / (columns * WIDTH), bottom, 1 - 0.15 / (columns * WIDTH), 1 - (HEAD + 0.1) / height, 0.28, 0.5
        )
        _legend(figure, panels, colours, dashes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()

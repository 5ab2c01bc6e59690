"""Panels as SVG, for the page and for files alike: the same text for the same numbers, words as text.

`draw` gives one panel as an ``<svg>`` element: the page holds it as it is, and `sheet` puts several of them into one
file with a legend. Every curve of a method lies in an element with the attribute ``data-method``, by which the page
hides and shows it; ink is ``currentColor``, so that the page's light or dark colours apply.
"""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from spectreg_lab.exhibits.exhibit import Line, Panel, has_band

INK = "#010203"  # a colour that nothing else has: it becomes currentColor
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
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
STROKES: dict[str, Any] = {"solid": "-", "dashed": (0, (5, 2)), "dotted": (0, (1, 1.6))}
DASH_ARRAYS = {"solid": "none", "dashed": "6 3", "dotted": "1.5 2.5"}
MARKERS = {"circle": "o", "diamond": "D", "line": "_", "square": "s"}
MANY = 300  # a range of this many times has ticks enough at the powers of ten
PLACES = re.compile(r' (?:d|x|y|width|height|points|style|transform)="[^"]*"')  # attributes that hold coordinates
LONG = re.compile(r"(\d\.\d{1,2})\d+")
WIDTH, HEIGHT = 288, 194  # points
LEGEND = 22  # points, a line of the legend


def _mark(artist: Artist, line: Line) -> None:
    artist.set_gid(f"method:{line.method}:{line.name}")


def _draw_line(axes: Axes, line: Line, colour: str) -> None:
    if line.marker:
        style: Any = {"markersize": 4, "alpha": 0.85, "clip_on": False}
        _mark(axes.plot(line.x, line.y, MARKERS[line.marker], color=colour, **style)[0], line)
        return
    _mark(axes.plot(line.x, line.y, color=colour, linestyle=STROKES[line.dash])[0], line)
    if has_band(line):
        band = axes.fill_between(line.x, line.low or 0, line.high or 0, color=colour, alpha=0.1, linewidth=0)
        _mark(band, line)


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
    axes.set_title(panel.title, loc="left", y=1.02, parse_math=False)  # matplotlib takes long to find a place by itself
    if panel.ticks:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()), parse_math=False)
        axes.set_xlim(-0.5, len(panel.ticks) - 0.5)
    axes.set(xlabel=panel.x, ylabel=panel.y)
    if panel.log:
        _log_ticks(axes)
    axes.margins(x=0.15 if panel.lines and panel.lines[0].marker else 0.02)


def draw(panel: Panel, colours: Mapping[str, str], name: str) -> str:
    """One panel as an ``<svg>`` element; ``name`` keeps its ids apart from those of others on the same page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_subplot()
        _draw(axes, panel, colours)
        figure.subplots_adjust(0.18, 0.2, 0.97, 0.88)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _element(file.getvalue(), escape(panel.title), name)


def _element(text: str, title: str, name: str) -> str:
    """What matplotlib wrote, as an element that can stand beside others."""
    body = text[text.index("</defs>") + len("</defs>") : text.rindex("</svg>")].lstrip()
    body = re.sub(r'<g id="method:([^":]*):([^"]*)">', r'<g data-method="\1"><title>\2</title>', body)
    body = re.sub(r' id="(?![pm][0-9a-f]{10}|C\d)[^"]*"', "", body)  # only clips and marks are referred to
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = PLACES.sub(lambda place: LONG.sub(r"\1", place[0]), body).replace(INK, "currentColor")
    body = re.sub(r"\s*\n\s*(?=[MLCQz\d-])", " ", body)
    head = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" style="stroke-linejoin:round"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {head}>\n{body}</svg>\n'


def sheet(panels: Sequence[str], methods: Mapping[str, str], dashes: Mapping[str, str]) -> str:
    """A file with ``panels``, as `draw` gave them, in a grid above a legend of methods and dashes."""
    columns = min(len(panels), 2 if len(panels) <= 4 else 4)
    rows = -(-len(panels) // columns)
    places = [(WIDTH * (i % columns), HEIGHT * (i // columns)) for i in range(len(panels))]
    placed = [
        panel.replace("<svg", f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}"', 1)
        for panel, (x, y) in zip(panels, places, strict=True)
    ]
    samples = [*(_sample(name, colour, "solid") for name, colour in methods.items())]
    samples += [_sample(name, "#555555", dash) for dash, name in dashes.items()]
    size = f"{columns * WIDTH} {rows * HEIGHT + LEGEND * _lines_of(samples, columns * WIDTH)}"
    legend = "".join(_laid_out(samples, columns * WIDTH, rows * HEIGHT))
    style = "color:#1c1d1f;background:#ffffff;font:9px sans-serif"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" style="{style}">\n'
        f"{''.join(placed)}{legend}</svg>\n"
    )


def _sample(name: str, colour: str, dash: str) -> tuple[int, str]:
    """Width and drawing of one entry of a legend."""
    line = f'<path d="M 0 0 H 18" stroke="{colour}" stroke-width="2" stroke-dasharray="{DASH_ARRAYS[dash]}"/>'
    return 40 + 5 * len(name), f'{line}<text x="23" y="3" fill="currentColor">{escape(name)}</text>'


def _lines_of(samples: Sequence[tuple[int, str]], width: int) -> int:
    return 1 + sum(x for x, _ in samples) // width


def _laid_out(samples: Sequence[tuple[int, str]], width: int, top: int) -> list[str]:
    x, y, placed = 12, top + LEGEND // 2, []
    for needed, sample in samples:
        if x + needed > width and x > 12:
            x, y = 12, y + LEGEND
        placed.append(f'<g transform="translate({x} {y})">{sample}</g>\n')
        x += needed
    return placed

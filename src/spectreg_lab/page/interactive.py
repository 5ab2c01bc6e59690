"""Panels as plotly traces: plain data that the page's script draws when they are scrolled into sight."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spectreg_lab.exhibits.exhibit import Line, Panel, has_band

DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot"}
SYMBOLS = {"circle": "circle", "diamond": "diamond-open", "square": "square-open", "line": "line-ew-open"}
DIGITS = 5  # significant: more than a screen can show


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 1e6 else float(f"{number:.{DIGITS}g}")


def _band(line: Line, colour: str) -> list[dict[str, Any]]:
    if not has_band(line):
        return []
    outline = {
        "x": [_short(x) for x in [*line.x, *reversed(line.x)]],
        "y": [_short(y) for y in [*(line.high or ()), *reversed(line.low or ())]],
    }
    look = {"fill": "toself", "fillcolor": colour + "1a", "line": {"width": 0}, "hoverinfo": "skip", "mode": "lines"}
    return [outline | look | {"meta": line.method}]


def _trace(line: Line, colour: str) -> dict[str, Any]:
    values = {"x": [_short(x) for x in line.x], "y": [_short(y) for y in line.y]}
    points: dict[str, Any] = values | {"name": line.name, "meta": line.method}
    if line.marker:
        return points | {"mode": "markers", "marker": {"color": colour, "size": 8, "symbol": SYMBOLS[line.marker]}}
    return points | {"mode": "lines", "line": {"color": colour, "width": 1.7, "dash": DASHES[line.dash]}}


def traces(panel: Panel, colours: Mapping[str, str]) -> dict[str, Any]:
    """What the page's script needs to draw ``panel``; values that are not finite become gaps."""
    bands: Sequence[dict[str, Any]] = [band for line in panel.lines for band in _band(line, colours[line.method])]
    return {
        "x": panel.x,
        "y": panel.y,
        "log": panel.log,
        "ticks": [list(panel.ticks), list(panel.ticks.values())] if panel.ticks else None,
        "traces": [*bands, *(_trace(line, colours[line.method]) for line in panel.lines)],
    }

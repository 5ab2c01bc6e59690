"""From tidy numbers to lines: the reductions that several figures share."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Line, Panel
from spectreg_lab.statistics.frames import select
from spectreg_lab.storage.store import StudyRecord

T = TypeVar("T")
MARKERS = ("circle", "diamond", "square")
SPREAD = 0.6  # the part of the way to the next regime that the methods of one share


def finite(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows where all of these columns have finite numbers."""
    return frame.loc[np.isfinite(frame[list(columns)].to_numpy(dtype=float)).all(axis=1)]


def over_seeds(frame: pd.DataFrame, by: list[str], x: str, y: str) -> dict[Any, dict[str, Any]]:
    """The mean of ``y`` over seeds at each ``x`` with a band of one standard deviation, over the finite values.

    Returns:
        For each combination of ``by``, the ``x``, ``y``, ``low`` and ``high`` of a `Line`.

    >>> runs = pd.DataFrame({"method": "decay", "epoch": [1, 1, 2], "gap": [0.1, 0.3, 0.5]})
    >>> over_seeds(runs, ["method"], "epoch", "gap")[("decay",)]["y"]
    [0.2, 0.5]
    """
    means = finite(frame, y).groupby([*by, x])[y].agg(["mean", "std"]).reset_index()
    low, high = (means["mean"] + sign * means["std"].fillna(0.0) for sign in (-1, 1))
    table = means.assign(low=low, high=high).rename(columns={x: "x", "mean": "y"})
    columns = ["x", "y", "low", "high"]
    return {name: {key: list(rows[key]) for key in columns} for name, rows in table.groupby(by)}


def each(study: StudyRecord, groups: Mapping[Any, T]) -> Iterator[tuple[str, str, T]]:
    """Regime, method and what there is of both, in the study's order."""
    for regime in study.study["regimes"]:
        for method in study.study["methods"]:
            if (regime, method) in groups:
                yield regime, method, groups[regime, method]


def _rows(frame: pd.DataFrame) -> dict[Any, pd.DataFrame]:
    return dict(iter(frame.groupby(["regime", "method"])))


def by_regime(study: StudyRecord, frame: pd.DataFrame, x: str, y: str) -> list[Line]:
    """One line a method and regime, the first regime solid, the second dashed."""
    return [
        Line(f"{method}, {regime} batch", method, **line, dash=labels.dash(study, regime))
        for regime, method, line in each(study, over_seeds(frame, ["regime", "method"], x, y))
    ]


def trajectory(study: StudyRecord, frame: pd.DataFrame, x: str, y: str) -> list[Line]:
    """``y`` against ``x``, both mean over seeds at each epoch: one path through training a method and regime."""
    lines = []
    for regime, method, rows in each(study, _rows(finite(frame, x, y))):
        means = rows.groupby("epoch")[[x, y]].mean()
        name, dash = f"{method}, {regime} batch", labels.dash(study, regime)
        lines.append(Line(name, method, list(means[x]), list(means[y]), dash=dash))
    return lines


def scatter(study: StudyRecord, frame: pd.DataFrame, x: str, y: str) -> list[Line]:
    """One mark a run, its shape by regime."""
    order = list(study.study["regimes"])
    return [
        Line(
            f"{method}, {regime} batch",
            method,
            list(rows[x]),
            list(rows[y]),
            marker=MARKERS[min(order.index(regime), 2)],
        )
        for regime, method, rows in each(study, _rows(finite(frame, x, y)))
    ]


def strip(study: StudyRecord, frame: pd.DataFrame, column: str, **panel: Any) -> Panel:
    """One mark a run above the name of its regime, the methods side by side; ``frame`` is of one setting."""
    setting = next(iter(frame.setting), None)
    places = {regime: place for place, regime in enumerate(study.study["regimes"])}
    methods = list(study.study["methods"])
    lines = []
    for method in methods:
        own = select(finite(frame, column), method=method)
        aside = (methods.index(method) - (len(methods) - 1) / 2) * SPREAD / len(methods)
        x = [places[regime] + aside for regime in own.regime]
        lines.append(Line(method, method, x, list(own[column]), marker="circle"))
    ticks = {float(place): labels.batch(study, regime, setting) for regime, place in places.items()}
    return Panel(**{"x": "", "y": "", "ticks": ticks, "lines": [line for line in lines if line.y]} | panel)


def positive(lines: list[Line]) -> bool:
    """Whether a logarithmic axis can show every value."""
    return all(value > 0 for line in lines for value in line.y)


def drawn(panels: list[Panel]) -> list[Panel]:
    """The panels that have something to show."""
    return [panel for panel in panels if panel.lines]


def in_each_setting(
    study: StudyRecord, values: pd.DataFrame, panels: Callable[[StudyRecord, pd.DataFrame, str], list[Panel]]
) -> list[Panel]:
    """The panels of every setting's rows that have something to show."""
    return drawn([p for name in study.study["settings"] for p in panels(study, select(values, setting=name), name)])

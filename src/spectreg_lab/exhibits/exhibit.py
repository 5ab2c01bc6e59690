"""What an exhibit is: one table or figure, as data that a page, an SVG and a CSV are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Line:
    """One curve, or with ``marker`` one set of points, of a method. ``low`` and ``high`` bound its band."""

    name: str
    method: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dash: str = "solid"
    marker: str | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Panels of one ``group`` share an SVG; ``folded`` ones are shown on the page on request."""

    group: str
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, lines in small print below it, and whether it is the best of its row."""

    text: str
    small: Sequence[str] = ()
    bold: bool = False
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table to look at; the numbers to compute with are in the exhibit's frame."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Exhibit:
    """One table or figure: its numbers, how they are drawn, and which claim of the paper they test.

    Attributes:
        name: Stem of its files.
        frame: The tidy numbers, written as CSV.
        dashes: What solid, dashed and dotted lines stand for.
        missing: Why there is nothing to show and which command makes it; empty otherwise.
    """

    name: str
    title: str
    claim: str
    frame: pd.DataFrame
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()
    dashes: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    missing: str = ""


def over_seeds(frame: pd.DataFrame, x: str, y: str, name: str, method: str, dash: str = "solid") -> Line:
    """The mean of ``y`` over seeds at each ``x``, with a band of one standard deviation, over the finite values."""
    finite = frame[np.isfinite(frame[y].astype(float))]
    grouped = finite.groupby(x)[y]
    mean, spread = grouped.mean(), grouped.std(ddof=1).fillna(0.0)
    band = (mean - spread, mean + spread)
    return Line(name, method, list(mean.index), list(mean), list(band[0]), list(band[1]), dash)


def plus_minus(values: pd.Series, digits: int = 3) -> str:
    """Mean ± standard deviation, the latter only where there are two values or more."""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.{digits}f}"

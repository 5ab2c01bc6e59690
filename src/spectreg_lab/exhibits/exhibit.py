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


def has_band(line: Line) -> bool:
    """Whether the band of ``line`` is wide enough to be seen beside the line."""
    if line.low is None or line.high is None:
        return False
    return not np.allclose(line.low, line.high, rtol=1e-3, equal_nan=True)


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Panels of one ``group`` share an SVG; ``folded`` ones are shown on the page on request;
    ``ticks`` names the places of an x axis that has no numbers."""

    group: str
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log: bool = False
    folded: bool = False
    ticks: Mapping[float, str] = field(default_factory=dict)


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
class Verdict:
    """A claim: where, in whose words, what came of it, in short, and the comparisons behind that."""

    section: str
    sentence: str
    outcome: str
    line: str
    tables: Sequence[Table]


@dataclass(frozen=True)
class Exhibit:
    """One table or figure: its numbers, how they are drawn, and which claim of the paper they test.

    Attributes:
        name: Stem of its files.
        frame: The tidy numbers, written as CSV.
        dashes: What solid, dashed and dotted lines stand for.
        missing: Why there is nothing to show and which command makes it; empty otherwise.
        warnings: What a reader must know before anything else; shown at the top of the page.
        summary: Sentences before the tables.
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
    warnings: Sequence[str] = ()
    summary: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()


def signed(value: float, places: str = ".3g") -> str:
    """A number with its sign, as typeset.

    >>> signed(-0.0123), signed(0.5), signed(0.0)
    ('−0.0123', '+0.5', '0')
    """
    return f"{value:+{places}}".replace("-", "−") if value else "0"


def plus_minus(values: pd.Series, digits: int = 3) -> str:
    """Mean ± standard deviation, the latter only where there are two values or more."""
    mean = f"{values.mean():.{digits}f}"
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return (mean + spread).replace("-", "−")

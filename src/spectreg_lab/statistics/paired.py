"""Differences between two methods over the seeds they share, with their uncertainty."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from spectreg_lab.exhibits.exhibit import signed

Name = TypeVar("Name", bound=Hashable)
Unit = Literal["", "ratio", "correlation"]
# Differences below this are rounding, and would make a tiny p of nothing: stored accuracies have seven digits, and a
# single one of a million images would be more.
ROUNDING = 1e-6
ANY = (-math.inf, math.inf)  # bounds of what has none


def shown(value: float, unit: Unit = "") -> str:
    """A difference as it is printed: as it is; a difference of logarithms as a ratio; Fisher's z as the correlation.

    >>> shown(0.5), shown(math.log(2), "ratio"), shown(math.atanh(0.9), "correlation")
    ('+0.5', '×2', '+0.9')
    """
    if unit == "ratio":
        return f"×{math.exp(min(value, 700)):.3g}"
    return signed(math.tanh(value) if unit == "correlation" else value)


@dataclass(frozen=True)
class Difference:
    """Mean paired difference over ``n`` seeds, its 95 % interval and the p value of Student's paired test.

    The interval and ``p`` are NaN for fewer than two seeds. Where all seeds differ by the same amount the interval is
    NaN, as nothing says how much another seed would differ, and ``p`` is 1 for no difference and otherwise NaN.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int

    def __str__(self) -> str:
        return self.text()

    def text(self, unit: Unit = "") -> str:
        """The mean with its interval and the number of seeds."""
        if self.n < 2:
            return f"{shown(self.mean, unit)} (n = {self.n})" if self.n else "no pair of seeds"
        if math.isnan(self.low) or self.low == self.high:
            return f"{shown(self.mean, unit)} in each of {self.n} seeds"
        return f"{shown(self.mean, unit)} [{shown(self.low, unit)}, {shown(self.high, unit)}], n = {self.n}"

    @property
    def evidence(self) -> float:
        """From −1, surely negative, to 1, surely positive: ``1 − p`` with the sign of the mean; 0 where p is NaN."""
        return 0.0 if math.isnan(self.p) else math.copysign(1 - self.p, self.mean)


def finite(differences: pd.Series) -> np.ndarray:
    """The values that are finite numbers, those within rounding of zero as zero."""
    values = differences.astype(float).to_numpy()
    values = values[np.isfinite(values)]
    return np.where(np.abs(values) < ROUNDING, 0.0, values)


def interval(differences: pd.Series, bounds: tuple[float, float] = ANY, level: float = 0.05) -> Difference:
    """Student's interval for the mean of ``differences``, one a seed; values that are not finite are left out.

    Args:
        bounds: The least and the most that a value can be; the interval does not leave them. Where all values are at
            one of these, as accuracies of 1 and rank correlations of 1 are, that is an outcome: the interval has no
            width, and ``p`` is 0.
        level: One minus the coverage of the interval.

    >>> str(interval(pd.Series([0.01, 0.02, 0.03])))
    '+0.02 [−0.00484, +0.0448], n = 3'
    >>> str(interval(pd.Series([0.01, 0.02, 0.03]), (-1, 0.04)))
    '+0.02 [−0.00484, +0.04], n = 3'
    >>> str(interval(pd.Series([0.01])))
    '+0.01 (n = 1)'
    >>> str(interval(pd.Series([0.01, 0.01])))
    '+0.01 in each of 2 seeds'
    >>> interval(pd.Series([1.0, 1.0])).low, interval(pd.Series([1.0, 1.0]), (-1, 1)).low
    (nan, 1.0)
    """
    values = finite(differences)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2:
        return Difference(mean, math.nan, math.nan, math.nan, n)
    if np.ptp(values) < ROUNDING:
        reached = any(math.isclose(mean, bound) for bound in bounds)
        bound, p = (mean, 0.0) if reached else (math.nan, math.nan)
        return Difference(mean, bound, bound, 1.0 if mean == 0 else p, n)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = float(stdtrit(n - 1, 1 - level / 2)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error))
    return Difference(mean, *within(mean, half, bounds), p, n)


def within(mean: float, half: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """The ends of an interval, which leave ``bounds`` only where the mean itself does."""
    return max(mean - half, min(mean, bounds[0])), min(mean + half, max(mean, bounds[1]))


def paired(first: pd.Series, second: pd.Series) -> Difference:
    """``first`` minus ``second`` over the seeds (the index) that both have."""
    return interval((first - second).dropna())


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's step-down correction; NaN stays NaN and does not count as a comparison.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    known = sorted(((name, p) for name, p in p_values.items() if not math.isnan(p)), key=lambda pair: pair[1])
    corrected, floor = {}, 0.0
    for rank, (name, p) in enumerate(known):
        floor = max(floor, min(1.0, (len(known) - rank) * p))
        corrected[name] = floor
    return corrected | {name: p for name, p in p_values.items() if math.isnan(p)}


def between(by_method: Mapping[str, pd.Series]) -> dict[frozenset[str], float]:
    """Of every pair of methods the p value of their paired difference, corrected by Holm for all pairs.

    The one correction for single comparisons of methods in a setting and regime, in Table 1 and beneath verdicts alike.
    """
    pairs = combinations(by_method, 2)
    return holm({frozenset(pair): paired(*(by_method[name] for name in pair)).p for pair in pairs})

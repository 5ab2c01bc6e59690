"""Differences between two methods over the seeds they share, with their uncertainty."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
from scipy import stats

from spectreg_lab.exhibits.exhibit import signed

Name = TypeVar("Name", bound=Hashable)
ROUNDING = 1e-12  # differences of accuracies below this are rounding, and would make a tiny p of nothing


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
        if self.n < 2:
            return f"{signed(self.mean)} (n = {self.n})" if self.n else "no pair of seeds"
        if math.isnan(self.low) or self.low == self.high:
            return f"{signed(self.mean)} in each of {self.n} seeds"
        return f"{signed(self.mean)} [{signed(self.low)}, {signed(self.high)}], n = {self.n}"

    @property
    def evidence(self) -> float:
        """From −1, surely negative, to 1, surely positive: ``1 − p`` with the sign of the mean; 0 where p is NaN."""
        return 0.0 if math.isnan(self.p) else math.copysign(1 - self.p, self.mean)


def interval(differences: pd.Series, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Difference:
    """Student's 95 % interval for the mean of ``differences``, one a seed; values that are not finite are left out.

    Args:
        bounds: The least and the most that a value can be. Where all are at one of these, as accuracies of 1 and rank
            correlations of 1 are, that is an outcome: the interval has no width, and ``p`` is 0.

    >>> str(interval(pd.Series([0.01, 0.02, 0.03])))
    '+0.02 [−0.00484, +0.0448], n = 3'
    >>> str(interval(pd.Series([0.01])))
    '+0.01 (n = 1)'
    >>> str(interval(pd.Series([0.01, 0.01])))
    '+0.01 in each of 2 seeds'
    >>> interval(pd.Series([1.0, 1.0])).low, interval(pd.Series([1.0, 1.0]), (-1, 1)).low
    (nan, 1.0)
    """
    values = differences.astype(float).to_numpy()
    values = values[np.isfinite(values)]
    values[np.abs(values) < ROUNDING] = 0.0
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2:
        return Difference(mean, math.nan, math.nan, math.nan, n)
    if np.ptp(values) < ROUNDING:
        reached = any(math.isclose(mean, bound) for bound in bounds)
        bound, p = (mean, 0.0) if reached else (math.nan, math.nan)
        return Difference(mean, bound, bound, 1.0 if mean == 0 else p, n)
    test = stats.ttest_rel(values, np.zeros(n))
    found = test.confidence_interval(0.95)
    return Difference(mean, float(found.low), float(found.high), float(test.pvalue), n)


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

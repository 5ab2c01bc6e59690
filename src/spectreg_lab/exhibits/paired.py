"""Differences between two methods over the seeds they share, with their uncertainty."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from spectreg_lab.exhibits.exhibit import signed

ROUNDING = 1e-12  # differences of accuracies below this are rounding, and would make a tiny p of nothing


@dataclass(frozen=True)
class Difference:
    """Mean paired difference over ``n`` seeds, its 95 % interval and the p value of Student's paired test.

    The interval and ``p`` are NaN for fewer than two seeds. Where all seeds differ by the same amount the interval has
    no width, and ``p`` is 1 for no difference and otherwise NaN, as Student's statistic is not finite.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int

    def __str__(self) -> str:
        if self.n < 2:
            return f"{signed(self.mean)} (n = {self.n})" if self.n else "no pair of seeds"
        if self.low == self.high:
            return f"{signed(self.mean)} in each of {self.n} seeds"
        return f"{signed(self.mean)} [{signed(self.low)}, {signed(self.high)}], n = {self.n}"


def interval(differences: pd.Series) -> Difference:
    """Student's 95 % interval for the mean of ``differences``, one a seed; values that are not finite are left out.

    >>> str(interval(pd.Series([0.01, 0.02, 0.03])))
    '+0.02 [−0.00484, +0.0448], n = 3'
    >>> str(interval(pd.Series([0.01])))
    '+0.01 (n = 1)'
    >>> str(interval(pd.Series([0.01, 0.01])))
    '+0.01 in each of 2 seeds'
    """
    values = differences.astype(float).to_numpy()
    values = values[np.isfinite(values)]
    values[np.abs(values) < ROUNDING] = 0.0
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2:
        return Difference(mean, math.nan, math.nan, math.nan, n)
    if np.ptp(values) < ROUNDING:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else math.nan, n)
    test = stats.ttest_rel(values, np.zeros(n))
    bounds = test.confidence_interval(0.95)
    return Difference(mean, float(bounds.low), float(bounds.high), float(test.pvalue), n)


def paired(first: pd.Series, second: pd.Series) -> Difference:
    """``first`` minus ``second`` over the seeds (the index) that both have."""
    return interval((first - second).dropna())


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction; NaN stays NaN and does not count as a comparison.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    corrected, floor = {}, 0.0
    for rank, (p, name) in enumerate(known):
        floor = max(floor, min(1.0, (len(known) - rank) * p))
        corrected[name] = floor
    return corrected | {name: p for name, p in p_values.items() if math.isnan(p)}

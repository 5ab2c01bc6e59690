"""The claims of Sections 4.1 to 4.4 as paired comparisons: a positive difference is what the paper says."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from spectreg_lab.exhibits.fit import ENOUGH
from spectreg_lab.exhibits.frames import POINT, finished, select
from spectreg_lab.exhibits.paired import Difference, interval, paired

BASELINES = ("vanilla", "decay", "adversarial")
METHODS = (*BASELINES, "spectral")


@dataclass(frozen=True)
class Comparison:
    """One instance of a claim: in which setting, of what, and the difference over seeds."""

    setting: str
    what: str
    difference: Difference


@dataclass(frozen=True)
class Numbers:
    """What claims are about: ``runs`` has one row a finished run, ``epochs`` one an epoch, ``regimes`` small first."""

    runs: pd.DataFrame
    epochs: pd.DataFrame
    settings: tuple[str, ...]
    regimes: tuple[str, ...]

    @cached_property
    def _by_method(self) -> dict[Any, pd.DataFrame]:
        return {name: rows.set_index("seed") for name, rows in self.runs.groupby(["setting", "regime", "method"])}

    def of(self, setting: str, regime: str, method: str, column: str) -> pd.Series:
        """A number of every finished run, by seed."""
        rows = self._by_method.get((setting, regime, method))
        return pd.Series(dtype=float) if rows is None else rows[column].astype(float)

    def shrinkage(self, setting: str, method: str, column: str) -> pd.Series:
        """The number at the small batch minus that at the large one, by seed."""
        small, large = self.regimes[0], self.regimes[-1]
        return self.of(setting, small, method, column) - self.of(setting, large, method, column)


Comparisons = Callable[[Numbers], Iterator[Comparison]]


def more(column: str, higher: tuple[str, ...], lower: tuple[str, ...], regimes: slice = slice(None)) -> Comparisons:
    """Each method of ``higher`` has more of ``column`` than each of ``lower``, in these regimes."""

    def compare(numbers: Numbers) -> Iterator[Comparison]:
        for setting in numbers.settings:
            for regime in numbers.regimes[regimes]:
                for above in higher:
                    for below in (method for method in lower if method != above):
                        pair = [numbers.of(setting, regime, method, column) for method in (above, below)]
                        yield Comparison(setting, f"{above} − {below}, {regime} batch", paired(*pair))

    return compare


def batch(column: str, methods: tuple[str, ...], sign: int = 1) -> Comparisons:
    """``column`` falls (``sign`` 1) or rises (−1) from the small batch to the large one, for each method."""

    def compare(numbers: Numbers) -> Iterator[Comparison]:
        for setting in numbers.settings if len(numbers.regimes) > 1 else ():
            for method in methods:
                change = sign * numbers.shrinkage(setting, method, column)
                small, large = numbers.regimes[:: len(numbers.regimes) - 1][::sign]
                yield Comparison(setting, f"{method}, {small} − {large} batch", interval(change))

    return compare


def batch_more(column: str, methods: tuple[str, ...], than: str, sign: int = 1) -> Comparisons:
    """That change is greater for each of ``methods`` than for ``than``."""

    def compare(numbers: Numbers) -> Iterator[Comparison]:
        for setting in numbers.settings if len(numbers.regimes) > 1 else ():
            for method in methods:
                both = [sign * numbers.shrinkage(setting, name, column) for name in (method, than)]
                yield Comparison(setting, f"change of {method} − that of {than}", paired(*both))

    return compare


def fits(numbers: Numbers) -> Iterator[Comparison]:
    """Training accuracy exceeds 95 %."""
    for setting in numbers.settings:
        for regime in numbers.regimes:
            for method in METHODS:
                over = numbers.of(setting, regime, method, "train_accuracy") - ENOUGH
                yield Comparison(setting, f"{method} − {ENOUGH}, {regime} batch", interval(over))


def rank_correlation(rows: pd.DataFrame, column: str) -> float:
    """Spearman's correlation of ``column`` with the gap; NaN below three points or where either is constant."""
    known = rows[["gap", column]].astype(float).replace([np.inf, -np.inf], np.nan).dropna()
    if len(known) < 3 or known.nunique().min() < 2:
        return math.nan
    return float(stats.spearmanr(known["gap"], known[column]).statistic)


def _through_training(numbers: Numbers, column: str) -> pd.DataFrame:
    """One row a run: the rank correlation of ``column`` with the gap over its epochs."""
    curves = numbers.epochs[[*POINT, "gap", column]].dropna(subset=[column])
    found = {point: rank_correlation(curve, column) for point, curve in curves.groupby(POINT)}
    return pd.DataFrame([(*point, value) for point, value in found.items()], columns=[*POINT, "value"])


def goes_with_the_gap(first: str, second: str | None = None) -> Comparisons:
    """Through training ``first`` rises with the gap (rank correlation, mean over methods), more so than ``second``."""

    def compare(numbers: Numbers) -> Iterator[Comparison]:
        found = _through_training(numbers, first).set_index(POINT).value
        if second is not None:
            found = found - _through_training(numbers, second).set_index(POINT).value
        correlations = found.dropna().reset_index()
        for setting in numbers.settings:
            for regime in numbers.regimes:
                by_seed = select(correlations, setting=setting, regime=regime).groupby("seed").value.mean()
                yield Comparison(setting, f"correlation, {regime} batch", interval(by_seed))

    return compare


def predicts_better(first: str, second: str) -> Comparisons:
    """Over the methods and regimes of one seed, ``first`` ranks the gap better than ``second`` does."""

    def compare(numbers: Numbers) -> Iterator[Comparison]:
        for setting in numbers.settings:
            seeds = select(numbers.runs, setting=setting).groupby("seed")
            by_seed = {seed: rank_correlation(rows, first) - rank_correlation(rows, second) for seed, rows in seeds}
            yield Comparison(setting, "difference of rank correlations", interval(pd.Series(by_seed, dtype=float)))

    return compare


def numbers(study: dict, runs: pd.DataFrame, epochs: pd.DataFrame, shapes: pd.DataFrame) -> Numbers:
    """Collect what the claims need: the runs with their gap at α, and each run's spectra in three numbers."""
    logs = shapes.assign(**{name: np.log(shapes[name].astype(float)) for name in ("largest", "frobenius", "skew")})
    by_run = logs.groupby(POINT)[["largest", "frobenius", "skew"]].mean().reset_index()
    joined = runs.merge(by_run.astype({name: runs[name].dtype for name in POINT}), on=POINT, how="left")
    return Numbers(joined, finished(epochs), tuple(study["settings"]), tuple(study["regimes"]))

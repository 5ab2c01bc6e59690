"""The claims of Sections 4.1 to 4.4 as paired comparisons: a positive difference is what the paper says."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from spectreg_lab.statistics.frames import POINT, finished, select
from spectreg_lab.statistics.paired import Difference, interval, paired

ENOUGH = 0.95  # "all of them exceeds 95%", Section 4.1

BASELINES = ("vanilla", "decay", "adversarial")
METHODS = (*BASELINES, "spectral")
# "except for the DenseNet model on the STL-10 dataset", Section 4.1; and Appendix B names VGGNet and NIN alone where
# the gradient norm on training data does not predict the gap.
STL10 = "densenet22/stl10"


@dataclass(frozen=True)
class Comparison:
    """One instance of a claim: in which setting, of what, and the difference over seeds."""

    setting: str
    what: str
    difference: Difference


@dataclass(frozen=True)
class Numbers:
    """What claims are about: ``runs`` has one row a finished run, ``epochs`` one an epoch, ``regimes`` small first.

    ``paper`` has, by setting, the row of the paper's Table 1 that it stands for, None for none.
    """

    runs: pd.DataFrame
    epochs: pd.DataFrame
    settings: tuple[str, ...]
    regimes: tuple[str, ...]
    paper: dict[str, str | None] = field(default_factory=dict)

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


def but_for_stl10(comparisons: Comparisons) -> Comparisons:
    """The same in every setting but the one that stands for the paper's DenseNet on STL-10."""

    def compare(numbers: Numbers) -> Iterator[Comparison]:
        claimed = tuple(name for name in numbers.settings if numbers.paper.get(name) != STL10)
        return comparisons(replace(numbers, settings=claimed))

    return compare


def worst(comparisons: list[Comparison]) -> Comparison:
    """The comparison that speaks most against its claim, or least for it."""
    return min(comparisons, key=lambda found: (found.difference.evidence, found.difference.mean))


def best_or_smallest(numbers: Numbers) -> Iterator[Comparison]:
    """In each setting and regime spectral has the best accuracy or the smallest gap: the better of its two worst pairs.

    Its p is three times that of the pair, which is the worst of three.
    """
    for setting in numbers.settings:
        for regime in numbers.regimes:
            here = replace(numbers, settings=(setting,), regimes=(regime,))
            accuracy = worst(list(more("test_accuracy", ("spectral",), BASELINES)(here)))
            gap = worst(list(more("generalization_gap", BASELINES, ("spectral",))(here)))
            what, found = max((("accuracy", accuracy), ("gap", gap)), key=lambda pair: pair[1].difference.evidence)
            corrected = replace(found.difference, p=min(1.0, 3 * found.difference.p))
            yield Comparison(setting, f"{what}: {found.what}", corrected)


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
                yield Comparison(setting, f"{method} − {ENOUGH}, {regime} batch", interval(over, (-ENOUGH, 1 - ENOUGH)))


def rank_correlation(rows: pd.DataFrame, column: str, other: str = "gap") -> float:
    """Spearman's correlation of ``column`` with ``other``; NaN below three points or where either is constant."""
    known = rows[[other, column]].astype(float).replace([np.inf, -np.inf], np.nan).dropna()
    if len(known) < 3 or known.nunique().min() < 2:
        return math.nan
    return float(stats.spearmanr(known[other], known[column]).statistic)


def _through_training(numbers: Numbers, column: str, other: str) -> pd.Series:
    """The rank correlation of ``column`` with ``other`` over the measured epochs of each run."""
    curves = numbers.epochs[[*POINT, other, column]].dropna(subset=[column])
    found = {point: rank_correlation(curve, column, other) for point, curve in curves.groupby(POINT)}
    rows = [(*point, value) for point, value in found.items()]
    return pd.DataFrame(rows, columns=[*POINT, "value"]).set_index(POINT).value


def rises(column: str, along: str = "gap", less: str | None = None, sign: int = 1) -> Comparisons:
    """Through training ``column`` rises (``sign`` −1: falls) with ``along``, more so than ``less`` does.

    A rank correlation over the measured epochs of a run, mean over the methods of a seed.
    """

    def compare(numbers: Numbers) -> Iterator[Comparison]:
        found, most = sign * _through_training(numbers, column, along), 1
        if less is not None:
            most = 2
            found = found - _through_training(numbers, less, along)
        known = found.dropna().reset_index()
        for setting in numbers.settings:
            for regime in numbers.regimes:
                by_seed = select(known, setting=setting, regime=regime).groupby("seed").value.mean()
                yield Comparison(setting, f"correlation, {regime} batch", interval(by_seed, (-most, most)))

    return compare


def correlations(runs: pd.DataFrame, setting: str, column: str) -> pd.Series:
    """By seed: the rank correlation of ``column`` with the gap over the methods and regimes of a setting."""
    seeds = select(runs, setting=setting).groupby("seed")
    return pd.Series({seed: rank_correlation(rows, column) for seed, rows in seeds}, dtype=float)


def nearer(column: str, methods: tuple[str, ...], to: str, than: str) -> Comparisons:
    """Each of ``methods`` is nearer in ``column`` to the method ``to`` than to the method ``than``."""

    def compare(numbers: Numbers) -> Iterator[Comparison]:
        for setting in numbers.settings:
            for regime in numbers.regimes:
                for method in methods:
                    own = numbers.of(setting, regime, method, column)
                    far, near = ((own - numbers.of(setting, regime, name, column)).abs() for name in (than, to))
                    what = f"{method}: distance from {than} − that from {to}, {regime} batch"
                    yield Comparison(setting, what, paired(far, near))

    return compare


def predicts_better(first: str, second: str) -> Comparisons:
    """Over the methods and regimes of one seed, ``first`` ranks the gap better than ``second`` does, up or down."""

    def compare(numbers: Numbers) -> Iterator[Comparison]:
        for setting in numbers.settings:
            strengths = [correlations(numbers.runs, setting, column).abs() for column in (first, second)]
            yield Comparison(setting, "difference of |rank correlation|", paired(*strengths))

    return compare


def numbers(study: dict, runs: pd.DataFrame, epochs: pd.DataFrame, shapes: pd.DataFrame) -> Numbers:
    """Collect what the claims need: the runs with their gap at α, and each run's spectra in three numbers."""
    logs = shapes.assign(**{name: np.log(shapes[name].astype(float)) for name in ("largest", "frobenius", "skew")})
    by_run = logs.groupby(POINT)[["largest", "frobenius", "skew"]].mean().reset_index()
    joined = runs.merge(by_run.astype({name: runs[name].dtype for name in POINT}), on=POINT, how="left")
    paper = {name: described.get("paper") for name, described in study["settings"].items()}
    return Numbers(joined, finished(epochs), tuple(study["settings"]), tuple(study["regimes"]), paper)

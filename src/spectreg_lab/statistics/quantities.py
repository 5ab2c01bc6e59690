"""What claims are about: of each run a number, all of them in one table."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from spectreg_lab.exhibits.labels import batch_size
from spectreg_lab.statistics.frames import POINT, finished, number, select
from spectreg_lab.statistics.paired import Unit, between
from spectreg_lab.storage.store import RunRecord, StudyRecord

LOGARITHMS = ("input_gradient_train", "input_gradient_test", "hessian_train", "hessian_test")
PERTURBATIONS = ("random", "pgd")
# Rank correlations through training: of what, with what.
THROUGH_TRAINING = (
    ("input_gradient_test", "epoch"),
    ("input_gradient_train", "epoch"),
    ("input_gradient_test", "gap"),
    ("input_gradient_train", "gap"),
)
WEIGHTS = ("largest", "frobenius", "skew")


def unit(column: str) -> Unit:
    """How differences of a column of `Numbers.runs` are printed: of logarithms as a ratio, Fisher's z as a correlation.

    >>> unit("log_hessian_train"), unit("test_accuracy"), unit(through("hessian_train", "gap"))
    ('ratio', '', 'correlation')
    """
    return "ratio" if column.startswith("log_") else "correlation" if column.startswith("z_") else ""


def through(column: str, along: str) -> str:
    """The column that has Fisher's z of the correlation of ``column`` with ``along`` through a run's training."""
    return f"z_{column}_{along}"


def points(column: str) -> str:
    """The column that has the number of epochs that such a correlation is of."""
    return f"points_{column}"


@dataclass(frozen=True)
class Numbers:
    """``runs`` has one row a finished run, with the columns that claims name; ``regimes`` are small first.

    ``paper`` has, by setting, the row of the paper's Table 1 that it stands for, None for none. ``measured`` are the
    least and the greatest number of epochs that a correlation through a run's training is of.
    """

    runs: pd.DataFrame
    settings: tuple[str, ...]
    regimes: tuple[str, ...]
    methods: tuple[str, ...] = ()
    paper: dict[str, str | None] = field(default_factory=dict)
    measured: tuple[int, ...] = ()

    @cached_property
    def _by_method(self) -> dict[Any, pd.DataFrame]:
        return {name: rows.set_index("seed") for name, rows in self.runs.groupby(["setting", "regime", "method"])}

    def of(self, setting: str, regime: str, method: str, column: str) -> pd.Series:
        """A number of every finished run, by seed."""
        rows = self._by_method.get((setting, regime, method))
        return pd.Series(dtype=float) if rows is None or column not in rows else rows[column].astype(float)

    def change(self, setting: str, method: str, column: str) -> pd.Series:
        """The number at the large batch minus that at the small one, by seed."""
        small, large = (self.of(setting, regime, method, column) for regime in (self.regimes[0], self.regimes[-1]))
        return large - small

    def corrected(self, setting: str, regime: str, column: str) -> dict[frozenset[str], float]:
        """Of each pair of methods p of their difference, as `paired.between` corrects it."""
        cell = setting, regime, column
        if cell not in self._corrected:
            self._corrected[cell] = between({name: self.of(setting, regime, name, column) for name in self.methods})
        return self._corrected[cell]

    @cached_property
    def _corrected(self) -> dict[tuple[str, str, str], dict[frozenset[str], float]]:
        return {}


def rank_correlation(rows: pd.DataFrame, column: str, other: str = "gap") -> tuple[float, int]:
    """Spearman's correlation of ``column`` with ``other``, and of how many rows: of those that have both.

    NaN below three rows or where either is constant.
    """
    known = rows[[other, column]].astype(float).replace([np.inf, -np.inf], np.nan).dropna()
    if len(known) < 3 or known.nunique().min() < 2:
        return math.nan, len(known)
    return float(stats.spearmanr(known[other], known[column]).statistic), len(known)


def fisher(correlation: float, points: int) -> float:
    """Fisher's z of a rank correlation of ``points`` points: its interval, taken back, stays within −1 and 1.

    A correlation of ±1, whose z is infinite, is taken halfway to the next one that so many ranks can have. NaN stays.

    >>> round(fisher(0.5, 9), 3), fisher(1.0, 3), math.tanh(fisher(1.0, 3))
    (0.549, 0.9729550745276566, 0.75)
    """
    if math.isnan(correlation):
        return math.nan
    limit = 1 - 6 / (points**3 - points)
    return math.atanh(min(max(correlation, -limit), limit))


def correlations(runs: pd.DataFrame, setting: str, column: str) -> pd.DataFrame:
    """By seed: the rank correlation of ``column`` with the gap over a setting's methods and regimes, of how many runs.

    ``z`` is Fisher's.
    """
    seeds = {seed: rank_correlation(rows, column) for seed, rows in select(runs, setting=setting).groupby("seed")}
    rows = [(r, count, fisher(r, count)) for r, count in seeds.values()]
    return pd.DataFrame(rows, columns=["correlation", "runs", "z"], index=list(seeds))


def numbers(study: StudyRecord, runs: pd.DataFrame, epochs: pd.DataFrame) -> Numbers:
    """Collect what the claims need.

    Args:
        runs: Of `frames.runs`, joined with the gap at α: one row a finished run.
        epochs: Of `frames.epochs`.
    """
    logs = {f"log_{name}": np.log(runs[name].astype(float).where(runs[name] > 0)) for name in LOGARITHMS}
    rows = [_point(run) | of_run(run) for run in study.runs if run.status == "finished"]
    own = pd.DataFrame(rows, columns=None if rows else POINT).astype({name: runs[name].dtype for name in POINT})
    joined = (
        runs.assign(**logs).merge(own, on=POINT, how="left").merge(_through(finished(epochs)), on=POINT, how="left")
    )
    described = study.study
    counts = joined[[points(through(*pair)) for pair in THROUGH_TRAINING]].to_numpy(dtype=float)
    counts = counts[counts > 0]
    return Numbers(
        joined,
        tuple(described["settings"]),
        tuple(sorted(described["regimes"], key=lambda regime: _mean_batch(study, regime))),
        tuple(described["methods"]),
        {name: setting.get("paper") for name, setting in described["settings"].items()},
        tuple(dict.fromkeys([int(counts.min()), int(counts.max())])) if counts.size else (),
    )


def _mean_batch(study: StudyRecord, regime: str) -> float:
    """The mean batch size of a regime over settings; those without one keep the order that they have."""
    sizes = [size for setting in study.study["settings"] if (size := batch_size(study, regime, setting))]
    return sum(sizes) / len(sizes) if sizes else 0.0


def _point(run: RunRecord) -> dict[str, Any]:
    return {"setting": run.setting, "regime": run.regime, "method": run.method, "seed": run.seed}


def _through(epochs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for point, curve in epochs.groupby(POINT):
        row = dict(zip(POINT, point, strict=True))
        for pair in THROUGH_TRAINING:
            correlation, count = rank_correlation(curve, *pair)
            row |= {through(*pair): fisher(correlation, count), points(through(*pair)): count}
        rows.append(row)
    columns = [*POINT, *(name for pair in THROUGH_TRAINING for name in (through(*pair), points(through(*pair))))]
    return pd.DataFrame(rows, columns=columns).astype({name: epochs[name].dtype for name in POINT})


def of_run(run: RunRecord) -> dict[str, float]:
    """What a finished run's measures and metrics say, NaN for what was not measured."""
    return _spectra(run) | _perturbations(run) | _jacobian(run) | {"misjudged": _misjudged(run)}


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def shape(spectrum: np.ndarray) -> dict[str, float]:
    """Of one weight's singular values: the largest, the Frobenius norm, and the skew.

    The skew is the largest over the root mean square: 1 for a flat spectrum, √rank for a matrix of rank one.

    >>> shape(np.array([3.0, 0.0, 0.0, 0.0]))
    {'largest': 3.0, 'frobenius': 3.0, 'skew': 2.0}
    """
    largest, root = float(spectrum.max()), float(np.sqrt((spectrum**2).mean()))
    return {
        "largest": largest,
        "frobenius": float(np.sqrt((spectrum**2).sum())),
        "skew": largest / root if root else math.nan,
    }


def _spectra(run: RunRecord) -> dict[str, float]:
    """Logarithms, mean over the weights."""
    shapes = [shape(np.asarray(values, dtype=float)) for values in (run.measures.get("spectra") or {}).values()]
    return {
        f"log_{name}": float(np.mean([_log(one[name]) for one in shapes])) if shapes else math.nan for name in WEIGHTS
    }


def _perturbations(run: RunRecord) -> dict[str, float]:
    """Under perturbations of test images, mean over the radii: how far outputs move for their length, and accuracy."""
    quantities = {}
    for kind in PERTURBATIONS:
        points = (run.measures.get("perturbation") or {}).get(kind) or []
        stretches = [_log(number(point.get("ratio"))) for point in points]
        quantities[f"log_stretch_{kind}"] = float(np.mean(stretches)) if points else math.nan
        accuracies = [number(point.get("accuracy")) for point in points]
        quantities[f"accuracy_{kind}"] = float(np.mean(accuracies)) if points else math.nan
    return quantities


def _jacobian(run: RunRecord) -> dict[str, float]:
    """The median local norm on test images, and how often the largest fits into the product of the layers' norms."""
    jacobian = run.measures.get("jacobian") or {}
    norms = np.array([number(norm) for norm in jacobian.get("norms") or [None]])
    bound = number(jacobian.get("bound"))
    return {"log_local": _log(float(np.median(norms))), "log_loose": _log(bound) - _log(float(norms.max()))}


def _misjudged(run: RunRecord) -> float:
    """By how much the regularizer's σ differs from the exact one: the worst weight of an epoch, mean over epochs.

    As a share of the exact σ. The estimate is of the weights before an epoch's last step, the exact one of those after.
    """
    worst = []
    for line in run.metrics:
        exact, estimated = line.get("sigma") or {}, line.get("sigma_estimate") or {}
        ratios = [number(estimated[name]) / exact[name] for name in estimated if number(exact.get(name)) > 0]
        worst += [max(abs(ratio - 1) for ratio in ratios)] if ratios else []
    return float(np.mean(worst)) if worst else math.nan

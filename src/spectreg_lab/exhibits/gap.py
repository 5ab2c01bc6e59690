"""The generalization gap at a threshold, Section 4.1."""

import math

import pandas as pd

from spectreg_lab.exhibits.frames import POINT, finished, regimes, select
from spectreg_lab.store import StudyRecord


def gap_at(curve: pd.DataFrame, alpha: float) -> float | None:
    """The least difference between training and test accuracy over the epochs whose test accuracy exceeds ``alpha``.

    Returns:
        None where the run never gets there.

    >>> curve = pd.DataFrame({"test_accuracy": [0.5, 0.7, 0.8], "gap": [0.0, 0.1, 0.2]})
    >>> gap_at(curve, 0.6), gap_at(curve, 0.8)
    (0.1, None)
    """
    reached = curve[curve.test_accuracy > alpha]
    return None if reached.empty else float(reached.gap.min())


def threshold(curves: pd.DataFrame) -> float | None:
    """The largest multiple of 0.01 that every run of ``curves`` exceeds; None where there is no run.

    >>> threshold(pd.DataFrame({"method": "vanilla", "seed": [0, 0, 1], "test_accuracy": [0.7, 0.884, 0.891]}))
    0.88
    """
    lowest = curves.groupby(["method", "seed"]).test_accuracy.max().min()
    if math.isnan(lowest):
        return None
    return max(0, math.ceil(round(lowest * 100, 9)) - 1) / 100


def alphas(study: StudyRecord, curves: pd.DataFrame) -> dict[tuple[str, str], float | None]:
    """The threshold of each setting and regime: the study's own where it names one, else chosen from finished runs."""
    done = finished(curves)
    chosen: dict[tuple[str, str], float | None] = {}
    for setting, regime in regimes(study):
        own = (study.study["settings"][setting].get("alpha") or {}).get(regime)
        chosen[setting, regime] = threshold(select(done, setting=setting, regime=regime)) if own is None else float(own)
    return chosen


def gaps(curves: pd.DataFrame, thresholds: dict[tuple[str, str], float | None]) -> pd.DataFrame:
    """One row for each finished run: ``alpha`` and ``gap_at_alpha``, NaN where the run never reaches it."""
    rows = []
    for point, curve in finished(curves).groupby(POINT):
        alpha = thresholds[str(point[0]), str(point[1])]
        gap = None if alpha is None else gap_at(curve, alpha)
        rows.append((*point, alpha, math.nan if gap is None else gap))
    return pd.DataFrame(rows, columns=[*POINT, "alpha", "gap_at_alpha"])

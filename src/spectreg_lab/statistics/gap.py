"""The generalization gap at a threshold, Section 4.1."""

import math

import pandas as pd

from spectreg.measures.generalization import common_threshold, generalization_gap
from spectreg_lab.statistics.frames import POINT, finished, regimes, select
from spectreg_lab.storage.store import StudyRecord


def _threshold(curves: pd.DataFrame) -> float | None:
    """α for these runs, None where there is none."""
    runs = [list(run.test_accuracy.dropna()) for _, run in curves.groupby(POINT)]
    known = [accuracies for accuracies in runs if accuracies]
    return common_threshold(known) if known else None


def alphas(study: StudyRecord, curves: pd.DataFrame) -> dict[tuple[str, str], float | None]:
    """The threshold of each setting and regime: the study's own where it names one, else chosen from finished runs."""
    done = finished(curves)
    chosen: dict[tuple[str, str], float | None] = {}
    for setting, regime in regimes(study):
        own = (study.study["settings"][setting].get("alpha") or {}).get(regime)
        chosen[setting, regime] = (
            _threshold(select(done, setting=setting, regime=regime)) if own is None else float(own)
        )
    return chosen


def gaps(curves: pd.DataFrame, thresholds: dict[tuple[str, str], float | None]) -> pd.DataFrame:
    """One row for each finished run: ``alpha`` and ``gap_at_alpha``, NaN where the run never reaches it."""
    rows = []
    for point, curve in finished(curves).groupby(POINT):
        alpha = thresholds[str(point[0]), str(point[1])]
        accuracies = list(curve.train_accuracy), list(curve.test_accuracy)
        gap = None if alpha is None else generalization_gap(*accuracies, alpha)
        rows.append((*point, alpha, math.nan if gap is None else gap))
    return pd.DataFrame(rows, columns=[*POINT, "alpha", "gap_at_alpha"])

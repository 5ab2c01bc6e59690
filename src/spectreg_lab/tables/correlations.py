"""Section 4.3's question as numbers: what goes with the generalization gap, over methods and regimes."""

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Table, plus_minus
from spectreg_lab.statistics.frames import finished, select
from spectreg_lab.statistics.quantities import correlations
from spectreg_lab.storage.store import StudyRecord

PREDICTORS = {
    "input_gradient_test": "gradient norm, test data",
    "input_gradient_train": "gradient norm, training data",
    "hessian_test": "Hessian eigenvalue, test data",
    "hessian_train": "Hessian eigenvalue, training data",
}


def values(study: StudyRecord, runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each setting, seed and predictor: its rank correlation with the gap, over ``runs`` finished runs."""
    done = finished(runs)
    rows = [
        (setting, seed, column, value, runs_of_it)
        for setting in study.study["settings"]
        for column in PREDICTORS
        for seed, value, runs_of_it, _ in correlations(done, setting, column).itertuples()
    ]
    return pd.DataFrame(rows, columns=["setting", "seed", "predictor", "correlation", "runs"])


def _cell(correlations: pd.DataFrame) -> Cell:
    known = correlations.dropna(subset="correlation")
    if known.empty:
        return Cell("–", tone="muted")
    runs = " to ".join(str(count) for count in sorted({known.runs.min(), known.runs.max()}))
    return Cell(plus_minus(known.correlation, 2), [f"n = {len(known)} seeds of {runs} runs"])


def exhibit(study: StudyRecord, values: pd.DataFrame) -> Exhibit:
    """Spearman's correlation of each predictor with the gap after training, mean over seeds."""
    rows = [
        [
            Cell(labels.setting(study, setting)),
            *(_cell(select(values, setting=setting, predictor=p)) for p in PREDICTORS),
        ]
        for setting in study.study["settings"]
    ]
    known = values.correlation.notna().any()
    return Exhibit(
        name="correlations",
        title="What goes with the gap: sensitivity or curvature",
        claim="Section 4.3: the largest eigenvalue of the Hessian is not a suggestive measure for generalizability; "
        "Section 1: insensitivity to the perturbation of test data is the more important factor.",
        frame=values,
        tables=[Table(["setting", *PREDICTORS.values()], rows)] if known else [],
        notes=[
            "Spearman's rank correlation with training minus test accuracy after the last epoch, over the methods and "
            "regimes of one seed; mean ± standard deviation over seeds. It says which goes with the gap, not which "
            "causes it.",
        ],
        missing=""
        if known
        else "no correlations: they take three measured runs of a seed; "
        "`spectreg measure STUDY_FOLDER` measures finished runs",
    )

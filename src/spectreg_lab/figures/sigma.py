"""The spectral norm of the weights over training."""

import math

import numpy as np
import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Exhibit, Panel
from spectreg_lab.figures import drawing
from spectreg_lab.statistics.frames import POINT, number, select
from spectreg_lab.storage.store import StudyRecord

COLUMNS = {"typical": "geometric mean over the weights", "largest": "largest over the weights"}


def values(study: StudyRecord) -> pd.DataFrame:
    """One row for each epoch of each run: the geometric mean and the largest of its weights' spectral norms."""
    rows = []
    for run in study.runs:
        for line in run.metrics if run.status in ("finished", "unfinished") else ():
            norms = np.array([number(value) for value in (line.get("sigma") or {}).values()])
            if norms.size:
                typical = float(np.exp(np.log(norms).mean())) if (norms > 0).all() else math.nan
                point = (run.setting, run.regime, run.method, run.seed, line["epoch"])
                rows.append((*point, typical, float(norms.max()), len(norms)))
    return pd.DataFrame(rows, columns=[*POINT, "epoch", *COLUMNS, "weights"])


def exhibit(study: StudyRecord, values: pd.DataFrame) -> Exhibit:
    """The true σ (of an SVD) after every epoch, mean over seeds."""
    panels = [
        Panel(setting, title, "epoch", "σ", drawing.by_regime(study, select(values, setting=setting), "epoch", column))
        for setting in study.study["settings"]
        for column, title in COLUMNS.items()
    ]
    return Exhibit(
        name="sigma",
        title="Spectral norm over training",
        claim="Section 3: the penalty keeps the spectral norm of every weight low during training.",
        frame=values,
        panels=drawing.drawn(panels),
        dashes=labels.dashes(study),
        notes=[
            "σ of the matrix that is regularized, by SVD. Mean over seeds, ± one standard deviation; metrics.jsonl of "
            "a run has σ of every weight."
        ],
        missing="" if drawing.drawn(panels) else "no run has recorded σ yet: `spectreg reproduce` does in every epoch",
    )

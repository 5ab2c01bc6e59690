"""The local Jacobian against the product of the layers' norms that bounds it, Section 3.1."""

import numpy as np
import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Exhibit, Line, Panel
from spectreg_lab.figures import drawing
from spectreg_lab.statistics.frames import POINT, number, regimes, select
from spectreg_lab.storage.store import StudyRecord

MARKS = {"median": "circle", "largest": "diamond", "bound": "line"}


def values(study: StudyRecord) -> pd.DataFrame:
    """One row for each measured run: local norms over its examples, and the product of the layers' norms."""
    rows = []
    for run in study.runs:
        jacobian = run.measures.get("jacobian") if run.status == "finished" else None
        if jacobian:
            norms = np.array([number(norm) for norm in jacobian.get("norms") or [None]])
            point = (run.setting, run.regime, run.method, run.seed)
            bound = number(jacobian.get("bound"))
            rows.append((*point, len(norms), np.median(norms), norms.max(), bound, jacobian.get("converged")))
    return pd.DataFrame(rows, columns=[*POINT, "examples", *MARKS, "converged"])


def _positive(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    known = drawing.finite(frame, column)
    return known.loc[known[column] > 0]


def _panel(study: StudyRecord, norms: pd.DataFrame, setting: str, regime: str) -> Panel:
    lines = [
        Line(f"{method}, {column}", method, [method] * len(positive), list(positive[column]), marker=mark)
        for method in study.study["methods"]
        for column, mark in MARKS.items()
        if not (positive := _positive(select(norms, method=method), column)).empty
    ]
    return Panel(setting, labels.batch(study, regime, setting), "", "norm", lines, log=True)


def exhibit(study: StudyRecord, values: pd.DataFrame) -> Exhibit:
    """Every run: the median and the largest local norm over its examples, and the bound."""
    panels = [
        _panel(study, select(values, setting=setting, regime=regime), setting, regime)
        for setting, regime in regimes(study)
    ]
    unconverged = int((values.converged == False).sum())  # noqa: E712
    zero = int((values[list(MARKS)] == 0).to_numpy().sum())
    notes = [f"{zero} norms are zero and below the logarithmic axis."] if zero else []
    return Exhibit(
        name="jacobian",
        title="Local Jacobian against the product of norms",
        claim="Section 3.1: the norm of the local linear map is at most the product of the layers' norms.",
        frame=values,
        panels=drawing.drawn(panels),
        notes=[
            "Circle: median over the examples of the local Jacobian's spectral norm; diamond: its largest; bar: the "
            "product of the layers' operator norms, which bounds both. One mark of each kind a run.",
            *notes,
        ],
        warnings=[f"Local Jacobian: the norms of {unconverged} runs had not converged."] if unconverged else [],
        missing="" if drawing.drawn(panels) else "no local Jacobians: `spectreg measure STUDY_FOLDER` computes them",
    )

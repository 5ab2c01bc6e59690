"""Figure 3: the largest eigenvalue of the Hessian of the loss."""

from typing import Any

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Exhibit, Panel
from spectreg_lab.figures import drawing
from spectreg_lab.statistics.frames import RESIDUALS, finished, select
from spectreg_lab.storage.store import StudyRecord

SIDES = {"train": "training data", "test": "test data"}
EIGENVALUES = [f"hessian_{side}" for side in SIDES]
MISSING = (
    "no Hessian eigenvalues: a study measures them during training where it asks for measures every few epochs, and "
    "`spectreg measure STUDY_FOLDER` measures finished runs"
)


def _panels(study: StudyRecord, epochs: pd.DataFrame, runs: pd.DataFrame, setting: str) -> list[Panel]:
    panels = []
    for side, data in SIDES.items():
        lines = drawing.by_regime(study, select(epochs, setting=setting), "epoch", f"hessian_{side}")
        log = drawing.positive(lines)
        panels.append(Panel(setting, f"{data}, over training", "epoch", "largest eigenvalue", lines, log))
    for side, data in SIDES.items():
        ends = select(finished(runs), setting=setting)
        title = f"{data}, after training"
        panels.append(drawing.strip(study, ends, f"hessian_{side}", group=setting, title=title, y="largest eigenvalue"))
    return panels


def _unconverged(study: StudyRecord) -> list[dict[str, Any]]:
    measured = [line.get("hessian") or {} for run in study.runs for line in [*run.metrics, run.measures]]
    return [side for both in measured for side in both.values() if side and side.get("converged") is False]


def exhibit(study: StudyRecord, epochs: pd.DataFrame, runs: pd.DataFrame) -> Exhibit:
    """Over training where it was measured then, and after it, every seed."""
    panels = [panel for setting in study.study["settings"] for panel in _panels(study, epochs, runs, setting)]
    unconverged = len(_unconverged(study))
    columns = ["setting", "regime", "method", "seed", "epoch", "gap", *EIGENVALUES, *RESIDUALS]
    ends = finished(runs).rename(columns={"epochs": "epoch"})[columns]
    frame = pd.concat([part for part in (epochs[columns], ends) if not part.empty] or [ends])
    return Exhibit(
        name="figure3",
        title="Figure 3. Largest eigenvalue of the Hessian",
        claim="Section 4.3: it grows with the batch under vanilla, is largest under spectral, and so does not predict "
        "the gap.",
        frame=frame.dropna(subset=EIGENVALUES, how="all").drop_duplicates(columns[:5], keep="last"),
        panels=drawing.drawn(panels),
        dashes=labels.dashes(study),
        notes=[
            "The largest algebraic eigenvalue of the Hessian of the mean loss by all parameters, evaluation mode. The "
            "CSV has its residual ‖Hv − μv‖ for a unit v: an eigenvalue lies no farther from μ than that."
        ],
        warnings=[f"Figure 3: {unconverged} Hessian eigenvalues had not converged when their iteration ended."]
        if unconverged
        else [],
        missing="" if drawing.drawn(panels) else MISSING,
    )

"""Accuracy and outputs under perturbed inputs: what Section 4.2 argues about and does not measure."""

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Exhibit, Panel
from spectreg_lab.figures import drawing
from spectreg_lab.statistics.frames import POINT, number, select
from spectreg_lab.storage.store import StudyRecord

KINDS = {
    "random": "random direction",
    "gradient": "along the gradient of the loss",
    "pgd": "worst found by projected gradient ascent",
}
MEASURED = {"accuracy": "test accuracy", "ratio": "‖f(x+ξ) − f(x)‖ / ‖ξ‖"}
COLUMNS = ["radius", "accuracy", "loss", "ratio"]


def values(study: StudyRecord) -> pd.DataFrame:
    """One row for each kind and radius of each measured run."""
    rows = [
        (run.setting, run.regime, run.method, run.seed, kind, *(number(point.get(name)) for name in COLUMNS))
        for run in study.runs
        if run.status == "finished"
        for kind, points in (run.measures.get("perturbation") or {}).items()
        for point in points
    ]
    return pd.DataFrame(rows, columns=[*POINT, "kind", *COLUMNS])


def _panels(study: StudyRecord, points: pd.DataFrame, setting: str) -> list[Panel]:
    return [
        Panel(
            setting,
            KINDS.get(kind, kind),
            "radius",
            label,
            drawing.by_regime(study, select(points, kind=kind), "radius", column),
        )
        for column, label in MEASURED.items()
        for kind in dict.fromkeys(points.kind)
    ]


def exhibit(study: StudyRecord, values: pd.DataFrame) -> Exhibit:
    """Mean over seeds for every kind of perturbation, by its ℓ₂ radius."""
    panels = drawing.in_each_setting(study, values, _panels)
    return Exhibit(
        name="perturbation",
        title="Outputs under real perturbations",
        claim="Section 3.1: a model with small spectral norms is insensitive to a perturbation of test data.",
        frame=values,
        panels=panels,
        dashes=labels.dashes(study),
        notes=["ℓ₂ radius in units of the normalised input, on test data. Mean over seeds, ± one standard deviation."],
        missing="" if panels else "no curves: `spectreg measure STUDY_FOLDER` computes them",
    )

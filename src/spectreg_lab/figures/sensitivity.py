"""Figures 2 and 6: the gradient of the loss by the input, over training and against the generalization gap."""

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Exhibit, Panel
from spectreg_lab.figures import drawing
from spectreg_lab.statistics.frames import finished, select
from spectreg_lab.storage.store import StudyRecord

SIDES = {"train": "training data", "test": "test data"}
MISSING = (
    "no gradient norms: a study measures them during training where it asks for measures every few epochs, and "
    "`spectreg measure STUDY_FOLDER` measures finished runs"
)


def _over_training(study: StudyRecord, epochs: pd.DataFrame, setting: str) -> list[Panel]:
    own = select(epochs, setting=setting)
    panels = []
    for side, data in SIDES.items():
        lines = drawing.by_regime(study, own, "epoch", f"input_gradient_{side}")
        panels.append(
            Panel(setting, f"{data}, over training", "epoch", "gradient norm", lines, drawing.positive(lines))
        )
    return panels


def _against_gap(study: StudyRecord, epochs: pd.DataFrame, runs: pd.DataFrame, setting: str) -> list[Panel]:
    panels = []
    for side, data in SIDES.items():
        column = f"input_gradient_{side}"
        lines = drawing.trajectory(study, select(epochs, setting=setting), "gap", column)
        lines += drawing.scatter(study, select(finished(runs), setting=setting), "gap", column)
        title = f"{data}, against the gap"
        panels.append(Panel(setting, title, "generalization gap", "gradient norm", lines, drawing.positive(lines)))
    return panels


def exhibit(study: StudyRecord, epochs: pd.DataFrame, runs: pd.DataFrame) -> Exhibit:
    """Mean over seeds; against the gap also every run's end."""
    panels = [
        panel
        for setting in study.study["settings"]
        for panel in [*_over_training(study, epochs, setting), *_against_gap(study, epochs, runs, setting)]
    ]
    columns = ["setting", "regime", "method", "seed", "epoch", "gap", "input_gradient_train", "input_gradient_test"]
    ends = finished(runs).rename(columns={"epochs": "epoch"})[columns]
    frame = pd.concat([part for part in (epochs[columns], ends) if not part.empty] or [ends])
    frame = frame.dropna(subset=columns[-2:], how="all").drop_duplicates(columns[:5], keep="last")
    return Exhibit(
        name="figure2",
        title="Figures 2 and 6. Sensitivity to the input and the generalization gap",
        claim="Section 4.2: the gradient norm on test data goes with the gap, that on training data does not.",
        frame=frame,
        panels=drawing.drawn(panels),
        dashes=labels.dashes(study),
        notes=[
            "The ℓ₂ norm of the gradient of an example's loss by its input, mean over the examples.",
            "Over training: mean over seeds, ± one standard deviation. Against the gap: a line is the path of the mean "
            "through training, a mark the end of one run (circles: small batch, diamonds: large).",
        ],
        missing="" if drawing.drawn(panels) else MISSING,
    )

"""Figures 1 and 5: accuracy and generalization gap over training."""

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Exhibit, Line, Panel
from spectreg_lab.figures.drawing import over_seeds
from spectreg_lab.statistics.frames import regimes, select
from spectreg_lab.storage.store import StudyRecord

COLUMNS = {"test_accuracy": ("test", "solid"), "train_accuracy": ("training", "dashed"), "gap": ("gap", "dotted")}


def _lines(study: StudyRecord, epochs: pd.DataFrame) -> list[Line]:
    means = {column: over_seeds(epochs, ["method"], "epoch", column) for column in COLUMNS}
    return [
        Line(f"{method}, {name}", method, **means[column][(method,)], dash=dash)
        for method in study.study["methods"]
        for column, (name, dash) in COLUMNS.items()
        if (method,) in means[column]
    ]


def exhibit(study: StudyRecord, epochs: pd.DataFrame) -> Exhibit:
    """Accuracy on test and training data and the gap between them, mean over seeds with a band of one deviation."""
    panels = [
        Panel(setting, labels.batch(study, regime, setting), "epoch", "accuracy", lines)
        for setting, regime in regimes(study)
        if (lines := _lines(study, select(epochs, setting=setting, regime=regime)))
    ]
    return Exhibit(
        name="figure1",
        title="Figures 1 and 5. Accuracy and generalization gap over training",
        claim="Section 4.1: in both regimes spectral has the smallest gap; that of decay grows with the batch.",
        frame=epochs,
        panels=panels,
        dashes={dash: name for name, dash in COLUMNS.values()},
        notes=["Lines: mean over seeds; bands: ± one standard deviation. Failed runs are left out."],
        missing="" if panels else "no run has finished an epoch yet: `spectreg reproduce` trains them",
    )

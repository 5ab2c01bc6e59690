"""Training accuracy reached: without it a comparison of methods says nothing."""

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Table, plus_minus
from spectreg_lab.statistics.frames import finished, regimes, select
from spectreg_lab.statistics.registered import ENOUGH
from spectreg_lab.storage.store import StudyRecord


def _cell(accuracies: pd.Series) -> Cell:
    if accuracies.empty:
        return Cell("–", ["no finished run"], tone="muted")
    short = int((~(accuracies > ENOUGH)).sum())
    return Cell(
        plus_minus(accuracies),
        [f"{short} of {len(accuracies)} seeds did not fit"] if short else [],
        tone="bad" * bool(short),
    )


def exhibit(study: StudyRecord, runs: pd.DataFrame) -> Exhibit:
    """Training accuracy after the last epoch, with a warning where a method did not fit its training data."""
    done = finished(runs)
    rows, warnings = [], []
    for setting, regime in regimes(study):
        ended = select(done, setting=setting, regime=regime)
        title, batch = labels.setting(study, setting), labels.batch(study, regime, setting)
        reached = {method: select(ended, method=method).train_accuracy for method in study.study["methods"]}
        rows.append([Cell(title, [batch]), *map(_cell, reached.values())])
        if short := [method for method, values in reached.items() if not (values > ENOUGH).all()]:
            warnings.append(
                f"{title}, {batch}: {', '.join(short)} did not reach a training accuracy over {ENOUGH} in every seed, "
                "so this comparison is between models that have not all fitted their training data."
            )
    return Exhibit(
        name="fit",
        title="Training accuracy reached",
        claim="Section 4.1: the method and the batch size do not matter for training accuracy; all exceed 95 %.",
        frame=done[["setting", "regime", "method", "seed", "train_accuracy", "train_loss"]],
        tables=[] if done.empty else [Table(["setting", *study.study["methods"]], rows)],
        warnings=warnings,
        missing="no run has finished yet: `spectreg reproduce` goes on where it stopped" if done.empty else "",
    )

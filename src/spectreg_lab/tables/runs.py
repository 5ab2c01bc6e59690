"""Every run of the study: what became of it."""

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Table
from spectreg_lab.storage.store import RunRecord, StudyRecord

CAUSES = {
    "missing": "not begun: `spectreg reproduce` runs it",
    "unfinished": "begun: `spectreg reproduce` goes on from its last epoch",
    "failed": "no cause was recorded",
}


def _row(study: StudyRecord, run: RunRecord) -> list[Cell]:
    cause = run.error or CAUSES.get(run.status, "")
    return [
        Cell(run.status, tone="bad" if run.status == "failed" else "open"),
        Cell(labels.setting(study, run.setting)),
        Cell(labels.batch(study, run.regime, run.setting)),
        Cell(run.method),
        Cell(str(run.seed)),
        Cell(cause.replace(f"{study.folder}/", ""), [run.folder.name], tone="wrap"),
    ]


def exhibit(study: StudyRecord, runs: pd.DataFrame) -> Exhibit:
    """The runs that have not finished, each with its cause."""
    rows = [_row(study, run) for run in study.runs if run.status != "finished"]
    counts = runs.status.value_counts()
    count = ", ".join(f"{counts[status]} {status}" for status in ("finished", *CAUSES) if status in counts)
    warning = f"{len(rows)} of {len(study.runs)} runs have not finished ({count}): they are named at the end."
    return Exhibit(
        name="runs",
        title="Runs that are missing or failed" if rows else "Runs",
        claim="",
        frame=runs,
        tables=[Table(["status", "setting", "regime", "method", "seed", "cause"], rows)] if rows else [],
        warnings=[warning] if rows else [],
        notes=[f"{len(study.runs)} runs: {count}." if study.runs else "The study names no runs."],
    )

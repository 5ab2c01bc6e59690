"""Table 1 and every figure: which runs, which reduction, the paper's value beside it."""

from spectreg_lab.exhibits import curves, frames, runs, table1
from spectreg_lab.exhibits.exhibit import Exhibit
from spectreg_lab.store import StudyRecord


def exhibits(study: StudyRecord) -> list[Exhibit]:
    """Every exhibit of a study, in the order of the page."""
    epochs, points = frames.epochs(study), frames.runs(study)
    values = table1.values(study, epochs, points)
    return [
        table1.exhibit(study, table1.frame(study, values), values),
        curves.exhibit(study, epochs),
        runs.exhibit(study, points),
    ]

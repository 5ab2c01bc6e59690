"""The norms of the layers as operators, whose product bounds the network, Section 3.1."""

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Exhibit, Panel
from spectreg_lab.figures import drawing
from spectreg_lab.statistics.frames import POINT, number, select
from spectreg_lab.storage.store import StudyRecord


def values(study: StudyRecord) -> pd.DataFrame:
    """One row for each operation of each measured run whose constant is not 1, in the order of the graph."""
    rows = []
    for run in study.runs:
        jacobian = (run.measures.get("jacobian") or {}) if run.status == "finished" else {}
        norms = {name: number(norm) for name, norm in (jacobian.get("layers") or {}).items()}
        point = (run.setting, run.regime, run.method, run.seed)
        counting = [(name, norm) for name, norm in norms.items() if norm != 1]
        rows += [(*point, index, name, norm) for index, (name, norm) in enumerate(counting, start=1)]
    return pd.DataFrame(rows, columns=[*POINT, "index", "layer", "norm"])


def _panel(study: StudyRecord, norms: pd.DataFrame, setting: str) -> Panel:
    lines = drawing.by_regime(study, select(norms, setting=setting), "index", "norm")
    return Panel(setting, "", "layer, in the order of the graph", "norm", lines, drawing.positive(lines))


def exhibit(study: StudyRecord, values: pd.DataFrame) -> Exhibit:
    """Every layer's norm, mean over seeds."""
    panels = drawing.drawn([_panel(study, values, setting) for setting in study.study["settings"]])
    return Exhibit(
        name="layers",
        title="Norms of the layers as operators",
        claim="Section 3.1: the penalty acts on the factors of the bound.",
        frame=values,
        panels=panels,
        dashes=labels.dashes(study),
        notes=[
            "Certified from above: a convolution by itself, on inputs of its size, with the batch normalization after "
            "it; a residual sum or a concatenation by what it adds to its largest input. Operations of norm 1 are left "
            "out. Mean over seeds, ± one standard deviation."
        ],
        missing="" if panels else "no norms of layers: `spectreg measure STUDY_FOLDER` computes them",
    )

"""Figure 4: the singular values of every weight."""

import numpy as np
import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Exhibit, Panel
from spectreg_lab.figures import drawing
from spectreg_lab.statistics.frames import POINT, select
from spectreg_lab.storage.store import StudyRecord


def values(study: StudyRecord) -> pd.DataFrame:
    """One row for each singular value of each weight of each measured run; ``index`` 1 is the largest."""
    measured = [
        ((run.setting, run.regime, run.method, run.seed, weight), np.asarray(spectrum, dtype=float))
        for run in study.runs
        if run.status == "finished"
        for weight, spectrum in (run.measures.get("spectra") or {}).items()
    ]
    points = pd.DataFrame([point for point, _ in measured], columns=[*POINT, "weight"])
    frame = points.loc[points.index.repeat([len(spectrum) for _, spectrum in measured])].reset_index(drop=True)
    spectra = [spectrum for _, spectrum in measured] or [np.empty(0)]
    indices = [np.arange(1, len(spectrum) + 1) for spectrum in spectra]
    return frame.assign(index=np.concatenate(indices), value=np.concatenate(spectra))


def _panels(study: StudyRecord, values: pd.DataFrame, setting: str) -> list[Panel]:
    weights = list(dict.fromkeys(values.weight))
    shown = {weights[i] for i in (0, len(weights) // 2, -1)} if weights else set()
    return [
        Panel(
            setting,
            weight,
            "index",
            "singular value",
            drawing.by_regime(study, select(values, weight=weight), "index", "value"),
            folded=weight not in shown,
        )
        for weight in weights
    ]


def exhibit(study: StudyRecord, values: pd.DataFrame) -> Exhibit:
    """The spectrum of every weight as the matrix that is regularized, mean over seeds."""
    panels = drawing.in_each_setting(study, values, _panels)
    return Exhibit(
        name="figure4",
        title="Figure 4. Singular values of the weights",
        claim="Section 4.4: skewed under vanilla, shrunk but skewed under adversarial and decay, flat under spectral.",
        frame=values.groupby(["setting", "weight", "regime", "method", "index"], sort=False)
        .value.agg(["mean", "std", "count"])
        .reset_index(),
        panels=panels,
        dashes=labels.dashes(study),
        notes=["Index of the singular value, largest first. Mean over seeds, ± one standard deviation."],
        missing="" if panels else "no spectra: `spectreg measure STUDY_FOLDER` computes them",
    )

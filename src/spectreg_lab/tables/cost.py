"""The cost of each method: seconds an epoch relative to vanilla."""

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Table, plus_minus
from spectreg_lab.figures import drawing
from spectreg_lab.statistics.frames import finished, regimes, select
from spectreg_lab.storage.store import StudyRecord


def ratios(runs: pd.DataFrame) -> pd.DataFrame:
    """``relative``: the median seconds an epoch of each finished run over those of vanilla with the same seed."""
    point = ["setting", "regime", "seed"]
    done = finished(runs)[[*point, "method", "seconds"]]
    vanilla = select(done, method="vanilla").rename(columns={"seconds": "vanilla"}).drop(columns="method")
    joined = done.merge(vanilla, on=point, how="left")
    return joined.assign(relative=joined.seconds / joined.vanilla)


def _cell(costs: pd.DataFrame) -> Cell:
    if costs.seconds.dropna().empty:
        return Cell("–", tone="muted")
    relative = costs.relative.dropna()
    small = [f"{costs.seconds.median():.3g} s an epoch"]
    return Cell(f"{plus_minus(relative, 2)} ×", small) if len(relative) else Cell("–", [*small, "no vanilla beside it"])


def exhibit(study: StudyRecord, runs: pd.DataFrame) -> Exhibit:
    """One row for each setting and regime."""
    values = ratios(runs)
    rows = []
    for setting, regime in regimes(study):
        costs = select(values, setting=setting, regime=regime)
        cells = [_cell(select(costs, method=method)) for method in study.study["methods"]]
        rows.append([Cell(labels.setting(study, setting), [labels.batch(study, regime, setting)]), *cells])
    panels = [
        drawing.strip(
            study,
            select(values, setting=setting),
            "relative",
            group="all",
            title=labels.setting(study, setting),
            y="seconds an epoch, vanilla = 1",
        )
        for setting in study.study["settings"]
    ]
    return Exhibit(
        name="cost",
        title="Cost of each method",
        claim="Section 3.2: one power step an iteration is enough, and it is cheap.",
        frame=values,
        panels=drawing.drawn(panels),
        tables=[] if values.empty else [Table(["setting", *study.study["methods"]], rows)],
        notes=[
            "Median seconds an epoch of a run over those of vanilla with the same seed; mean ± standard deviation over "
            "seeds. Runs of a study share the machine, so these are coarse: benchmarks/ times the methods in turn.",
        ],
        missing="no run has finished yet: `spectreg reproduce` goes on where it stopped" if values.empty else "",
    )

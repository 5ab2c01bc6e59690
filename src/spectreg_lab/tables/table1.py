"""Table 1: test accuracy and generalization gap of every method, the paper's beside ours."""

import math
from typing import Any

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Table, plus_minus, signed
from spectreg_lab.figures import drawing
from spectreg_lab.statistics import gap, paper
from spectreg_lab.statistics.frames import POINT, finished, records, regimes, select
from spectreg_lab.statistics.paired import Difference, between, paired
from spectreg_lab.storage.store import StudyRecord

METRICS = {"test_accuracy": "Test accuracy", "generalization_gap": "Generalization gap at α"}
BETTER = {"test_accuracy": max, "generalization_gap": min}
DIGITS = 3
NONE = Difference(math.nan, math.nan, math.nan, math.nan, 0)
ABOUT = (
    "Accuracy: after the last epoch. The gap at α is the least training minus test accuracy over the epochs whose "
    "test accuracy exceeds α; α is the study's, else the largest multiple of 0.01 that every run of the row exceeds. "
    "Mean ± standard deviation over seeds; the best mean of a row is bold.",
    "Δ: spectral minus this method, paired over the seeds that both have; p: Student's paired test, corrected by Holm "
    "for all pairs of methods of the row, as beneath the verdicts.",
)


def values(study: StudyRecord, epochs: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each finished run with ``test_accuracy``, ``alpha`` and ``generalization_gap``."""
    at_alpha = gap.gaps(epochs, gap.alphas(study, epochs)).rename(columns={"gap_at_alpha": "generalization_gap"})
    return finished(runs).merge(at_alpha, on=POINT, how="left")


def best(by_method: dict[str, pd.Series], metric: str) -> set[str]:
    """The methods whose mean, as printed, is the best; a mean over some seeds only is no rival to one over all."""
    most = max(map(len, by_method.values()), default=0)
    whole = {name: v for name, v in by_method.items() if most and len(v) == most and v.notna().all()}
    means = {name: round(float(v.mean()), DIGITS) for name, v in whole.items()}
    winner = BETTER[metric](means.values(), default=math.nan)
    return {name for name, mean in means.items() if mean == winner}


def _against_spectral(by_method: dict[str, pd.Series]) -> dict[str, tuple[Difference, float]]:
    spectral = by_method.get("spectral", pd.Series(dtype=float))
    differences = {name: paired(spectral, v) for name, v in by_method.items() if name != "spectral"}
    corrected = between(by_method)
    return {
        name: (difference, corrected.get(frozenset((name, "spectral")), math.nan))
        for name, difference in differences.items()
    }


def _row(study: StudyRecord, runs: pd.DataFrame, label: dict[str, str]) -> list[dict[str, Any]]:
    metric = label["metric"]
    by_method = {m: select(runs, method=m).set_index("seed")[metric].astype(float) for m in study.study["methods"]}
    winners, versus = best(by_method, metric), _against_spectral(by_method)
    published = paper.row(study, label["setting"], label["regime"], metric)
    rows = []
    for method, numbers in by_method.items():
        difference, p_holm = versus.get(method, (NONE, math.nan))
        rows.append(
            label
            | {
                "batch_size": labels.batch_size(study, label["regime"], label["setting"]),
                "alpha": runs.alpha.max() if metric == "generalization_gap" else math.nan,
                "method": method,
                "runs": len(numbers),
                "reached": int(numbers.notna().sum()),
                "mean": numbers.mean(),
                "sd": numbers.std(ddof=1),
                "best": method in winners,
                "spectral_minus_this": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "pairs": difference.n,
                "p": difference.p,
                "p_holm": p_holm,
                "paper": published.values.get(method, math.nan),
                "not_comparable_in": ", ".join(published.differing),
            }
        )
    return rows


def frame(study: StudyRecord, values: pd.DataFrame) -> pd.DataFrame:
    """One row for each metric, setting, regime and method."""
    rows = [
        row
        for metric in METRICS
        for setting, regime in regimes(study)
        for row in _row(
            study,
            select(values, setting=setting, regime=regime),
            {"metric": metric, "setting": setting, "regime": regime},
        )
    ]
    return pd.DataFrame(rows)


def _cell(row: dict[str, Any], numbers: pd.Series, seeds: int) -> Cell:
    if not row["runs"]:
        return Cell("–", ["no finished run"], tone="muted")
    small = [f"{row['runs']} of {seeds} seeds"] if row["runs"] < seeds else []
    if 0 < row["reached"] < row["runs"]:
        small.append(f"reached in {row['reached']} of {row['runs']} seeds")
    if row["pairs"] >= 2:
        tested = "in each seed" if math.isnan(row["p_holm"]) else f"p = {row['p_holm']:.2g}"
        small.append(f"Δ {signed(row['spectral_minus_this'], f'.{DIGITS}f')}, {tested}")
    if not math.isnan(row["paper"]):
        small.append(f"paper {row['paper']:.3f}{'†' if row['not_comparable_in'] else ''}")
    if not row["reached"]:
        return Cell("never reached", small, tone="muted")
    return Cell(plus_minus(numbers.dropna(), DIGITS), small, bold=row["best"])


def _head(study: StudyRecord, row: dict[str, Any]) -> list[Cell]:
    head = [Cell(labels.setting(study, row["setting"]), [labels.batch(study, row["regime"], row["setting"])])]
    if row["metric"] == "test_accuracy":
        return head
    return [*head, Cell("–" if math.isnan(row["alpha"]) else f"{row['alpha']:.2f}")]


def _table(study: StudyRecord, table: pd.DataFrame, values: pd.DataFrame, metric: str) -> Table:
    rows = []
    for setting, regime in regimes(study):
        cells = records(select(table, metric=metric, setting=setting, regime=regime))
        runs = select(values, setting=setting, regime=regime)
        seeds = max(cell["runs"] for cell in cells)
        columns_of_methods = [
            _cell(cell, select(runs, method=cell["method"])[metric].astype(float), seeds) for cell in cells
        ]
        rows.append([*_head(study, cells[0]), *columns_of_methods])
    columns = ["setting", *(["α"] if metric == "generalization_gap" else []), *study.study["methods"]]
    return Table(columns, rows, METRICS[metric])


def exhibit(study: StudyRecord, table: pd.DataFrame, values: pd.DataFrame) -> Exhibit:
    """Both halves of Table 1, with a paired test of spectral against every other method."""
    panels = [
        drawing.strip(study, select(values, setting=setting), metric, group=setting, title=title)
        for setting in study.study["settings"]
        for metric, title in METRICS.items()
    ]
    return Exhibit(
        name="table1",
        title="Table 1. Test accuracy and generalization gap",
        claim="Section 4.1: spectral has the best test accuracy in the large-batch regime, and the smallest gap.",
        frame=table,
        panels=drawing.drawn(panels),
        tables=[_table(study, table, values, metric) for metric in METRICS],
        notes=[*ABOUT, *paper.notes(study)],
        missing="no run has finished yet: `spectreg reproduce` goes on where it stopped" if values.empty else "",
    )

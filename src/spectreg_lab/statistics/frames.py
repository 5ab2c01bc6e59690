"""A study's records as tidy tables: one row an epoch, or one row a run."""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from spectreg_lab.storage.store import RunRecord, StudyRecord

POINT = ["setting", "regime", "method", "seed"]
SIDES = ("train", "test")
METRICS = ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "objective", "learning_rate", "seconds"]
RESIDUALS = [f"hessian_{side}_residual" for side in SIDES]
MEASURED = [*(f"{measure}_{side}" for measure in ("input_gradient", "hessian") for side in SIDES), *RESIDUALS]


def number(value: Any) -> float:
    """A float, NaN for whatever is not a number."""
    return float(value) if isinstance(value, int | float) else math.nan


def _point(run: RunRecord) -> dict[str, Any]:
    return {"setting": run.setting, "regime": run.regime, "method": run.method, "seed": run.seed, "status": run.status}


def regimes(study: StudyRecord) -> Iterator[tuple[str, str]]:
    """Every setting with every regime, in the study's order."""
    return ((setting, regime) for setting in study.study["settings"] for regime in study.study["regimes"])


def measured(measures: dict[str, Any]) -> dict[str, float]:
    """Gradient norms, Hessian eigenvalues and their residuals in a metrics line or a run's measures, else NaN."""
    gradient, hessian = measures.get("input_gradient") or {}, measures.get("hessian") or {}
    values = {f"input_gradient_{side}": number(gradient.get(side)) for side in SIDES}
    names = {"value": "hessian_{}", "residual": "hessian_{}_residual"}
    return values | {
        name.format(side): number((hessian.get(side) or {}).get(key)) for key, name in names.items() for side in SIDES
    }


def epochs(study: StudyRecord) -> pd.DataFrame:
    """One row for each epoch of each run that has not failed; ``gap`` is training minus test accuracy."""
    rows = [
        _point(run) | {"epoch": line["epoch"]} | {name: number(line.get(name)) for name in METRICS} | measured(line)
        for run in study.runs
        if run.status in ("finished", "unfinished")
        for line in run.metrics
    ]
    frame = pd.DataFrame(rows, columns=[*POINT, "status", "epoch", *METRICS, *MEASURED])
    return frame.assign(gap=frame.train_accuracy - frame.test_accuracy)


def _last(run: RunRecord) -> dict[str, Any]:
    line = run.metrics[-1] if run.metrics else {}
    after = {name: value for name, value in measured(run.measures).items() if not math.isnan(value)}
    return {name: number(line.get(name)) for name in METRICS} | measured(line) | after


def runs(study: StudyRecord) -> pd.DataFrame:
    """One row for each point of the study: its status, its cause if it failed, and its numbers after the last epoch."""
    rows = [
        _point(run)
        | {
            "error": run.error,
            "run": run.folder.name,
            "batch_size": run.config.get("batch_size"),
            "epochs": len(run.metrics),
        }
        | _last(run)
        | {"seconds": pd.Series([number(line.get("seconds")) for line in run.metrics], dtype=float).median()}
        for run in study.runs
    ]
    columns = [*POINT, "status", "error", "run", "batch_size", "epochs", *METRICS, *MEASURED]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(gap=frame.train_accuracy - frame.test_accuracy)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def select(frame: pd.DataFrame, **point: Any) -> pd.DataFrame:
    """The rows that have these values.

    >>> len(select(pd.DataFrame({"method": ["decay", "spectral"], "seed": [0, 0]}), method="decay", seed=0))
    1
    """
    for column, value in point.items():
        frame = frame[frame[column] == value]
    return frame


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of finished runs: only these enter tables and verdicts."""
    return frame[frame.status == "finished"]

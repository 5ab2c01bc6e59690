"""The study folder: the only module that knows the names of its files.

It holds ``study.json``, its runs in ``runs/`` (`spectreg_lab.storage.run_folder`), its page in ``report/`` and, where a
search chose its settings, that search's table in ``search.csv``. Nothing in it executes when it is read.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectreg_lab.storage import records
from spectreg_lab.storage.checkpoints import FORMAT
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.run_folder import CONFIG, METRICS, OUTCOME, RunFolder, read_json, write_json

STUDY, RUNS, REPORT, SEARCH = "study.json", "runs", "report", "search.csv"
REWRITTEN = "give the command that made it again, which rewrites it and keeps the runs"


@dataclass(frozen=True)
class RunRecord:
    """A point of a study and what is on disk of its run.

    ``status`` is ``finished``, ``failed``, ``unfinished`` (it has begun) or ``missing`` (it has not, or cannot be read;
    ``error`` says why). ``metrics`` has one dictionary an epoch, ``measures`` what was measured afterwards.
    """

    setting: str
    regime: str
    method: str
    seed: int
    folder: Path
    status: str
    error: str | None
    config: dict[str, Any]
    versions: dict[str, Any]
    metrics: list[dict[str, Any]]
    measures: dict[str, Any]


@dataclass(frozen=True)
class StudyRecord:
    """A study folder, read: ``study`` is the study file as data, ``runs`` one record a point, in the study's order.

    ``search`` is the table of the search that chose its settings, as CSV; None where there was none.
    """

    folder: Path
    study: dict[str, Any]
    runs: list[RunRecord]
    search: str | None = None


def find_run(study: Path, *names: str) -> Path:
    """Where a run lies in a study folder: under one of the ``names`` that it has had, else under the first."""
    places = [study / RUNS / name for name in names]
    return next((place for place in places if (place / CONFIG).exists()), places[0])


def finished_runs(folder: Path) -> list[Path]:
    """The folders of all runs in or below ``folder`` that have ended and have not failed."""
    return [place for place in sorted(_folders_with(OUTCOME, folder)) if not _failed(place)]


def _folders_with(name: str, folder: Path) -> Iterator[Path]:
    """The folders in or below ``folder`` that have a file of this name, through links too."""
    seen: set[Path] = set()  # links may go round in a circle
    for place, folders, names in os.walk(folder, followlinks=True):
        inside = {(Path(place) / n).resolve(): n for n in folders}
        folders[:] = [n for real, n in inside.items() if real not in seen]
        seen |= inside.keys()
        if name in names:
            yield Path(place)


def _failed(place: Path) -> bool:
    try:
        return (RunFolder(place).outcome() or {}).get("status") == "failed"
    except RunError:  # said when the run is read
        return False


def study_name(folder: Path) -> str | None:
    """The name of the study in ``folder``; None where there is none, or none that can be read."""
    try:
        return str(read_json(folder / STUDY, records.StudyFile)["study"]["name"])
    except (FileNotFoundError, RunError):
        return None


def begin_study(folder: Path, study: dict[str, Any], points: list[dict[str, Any]], command: str) -> None:
    """Record which runs make up a study: each point has ``setting``, ``regime``, ``method``, ``seed`` and ``run``."""
    _refuse_other_format(folder / STUDY)
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    write_json(folder / STUDY, {"format": FORMAT, "command": command, "study": study, "points": points})


def check_is_study(folder: Path) -> None:
    """Raise unless there is a study in ``folder``."""
    if not folder.exists():
        raise RunError(f"{folder}: there is no such file or folder")
    if not (folder / STUDY).exists():
        raise RunError(f"{folder} is not a study folder: it has no {STUDY}; `spectreg reproduce` makes one")


def _refuse_other_format(path: Path) -> None:
    """Raise where there is a study of another format version: it is neither read nor written over."""
    try:
        written = read_json(path).get("format", FORMAT)
    except (FileNotFoundError, RunError):
        return
    if written != FORMAT:
        raise RunError(
            f"{path} has format {written!r}; this version reads format {FORMAT}: use the spectreg version that wrote it"
        )


def read_study(folder: Path) -> StudyRecord:
    """Read a study folder, whatever state its runs are in; needs neither the data nor the weights."""
    check_is_study(folder)
    _refuse_other_format(folder / STUDY)
    content = read_json(folder / STUDY, records.StudyFile, REWRITTEN)
    runs = [_read_run(folder / RUNS, **point) for point in content["points"]]
    return StudyRecord(folder, {**content["study"], "command": content["command"]}, runs, _table(folder / SEARCH))


def _table(path: Path) -> str | None:
    """The table of a search, as it is; None where there is none."""
    try:
        return path.read_text("utf-8") if path.exists() else None
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not text ({error}): `spectreg search` writes it anew") from None


def _read_run(folder: Path, *, setting: str, regime: str, method: str, seed: int, run: str) -> RunRecord:
    point = RunFolder(folder / run)
    label = (setting, regime, method, seed, point.path)
    try:
        if not (point.path / CONFIG).exists():  # not begun, or its process died before it could begin
            outcome = point.outcome() or {}
            status = "failed" if outcome.get("status") == "failed" else "missing"
            return RunRecord(*label, status, outcome.get("error"), {}, {}, [], {})
        outcome = point.outcome() or {"status": "unfinished"}
        if outcome["status"] == "finished" and (lost := point.lost()):
            raise RunError(f"{lost} of its epochs are not in {METRICS}: `spectreg reproduce` runs it again")
        config = point.config().model_dump(mode="json")
        return RunRecord(
            *label,
            outcome["status"],
            outcome.get("error"),
            config,
            point.versions(),
            point.metrics(),
            point.measures() or {},
        )
    except (RunError, ValueError, OSError) as error:
        return RunRecord(*label, "missing", str(error), {}, {}, [], {})

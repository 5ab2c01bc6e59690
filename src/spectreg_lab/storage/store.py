"""The run folder: the only module that knows file names.

A run folder holds ``config.json`` (the setting), ``versions.json``, ``metrics.jsonl`` (one line an epoch), one or two
``checkpoint-N.safetensors``, ``outcome.json`` once the run has ended, ``measures.json`` once it has been measured and,
while a process works on it, that process's claim (`spectreg_lab.storage.claims`).
A study folder holds ``study.json``, its runs in ``runs/``, its page in ``report/`` and, where a search chose its
settings, that search's table in ``search.csv``. Nothing in either executes when
it is read. Every file but ``metrics.jsonl`` is written under a temporary name and renamed. An epoch's line comes before
its checkpoint, and lines newer than the checkpoint are dropped on resuming: a kill costs an epoch, never consistency.
"""

import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spectreg_lab.settings.config import Config
from spectreg_lab.storage.claims import Claim, claim
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.files import write

FORMAT = 1
CONFIG, VERSIONS, METRICS, OUTCOME = "config.json", "versions.json", "metrics.jsonl", "outcome.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)\.safetensors")
MEASURES, STUDY, RUNS, REPORT, SEARCH = "measures.json", "study.json", "runs", "report", "search.csv"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after ``epoch``: tensors by ``part/name``."""

    epoch: int
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors below ``name/``, without that prefix."""
        prefix = name + "/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON."""
    write(path, (json.dumps(content, indent=2) + "\n").encode())


RUN_AGAIN = "delete its folder and run again"
MEASURE_AGAIN = "delete it and `spectreg measure` its run again"
REWRITTEN = "give the command that made it again, which rewrites it and keeps the runs"


def read_json(path: Path, remedy: str = RUN_AGAIN) -> dict[str, Any]:
    """Read a JSON file that holds an object; a broken one is a `RunError` that names it and the ``remedy``."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}): {remedy}") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object: {remedy}")
    return found


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: Claim | None = None

    @contextmanager
    def claimed(self, **how: Any) -> Iterator[None]:
        """Hold the run (`claim` says what ``how`` may be): others are refused, and no write follows a takeover."""
        with claim(self.path, **how) as self._claim:
            try:
                yield
            finally:
                self._claim = None

    def _check_claim(self) -> None:
        if self._claim is not None:
            self._claim.check()

    def begin(self, config: Config, versions: dict[str, str]) -> None:
        """Record what this run is, or check that the folder is the same run's."""
        self._check_claim()
        mine = config.model_dump(mode="json")
        if not (self.path / CONFIG).exists():
            write_json(self.path / CONFIG, {"format": FORMAT, "config": mine})
            write_json(self.path / VERSIONS, versions)
            return
        found = self._setting()
        differing = sorted(key for key in {*found, *mine} if found.get(key) != mine.get(key))
        if differing:
            raise RunError(
                f"{self.path} holds a run with another setting (differs in: {', '.join(differing)}): "
                "use another folder, or delete this one"
            )
        self._record_versions(versions)

    def _record_versions(self, versions: dict[str, str]) -> None:
        """Versions are those that the first epoch was made with; where later ones differ, that is said beside them."""
        first = self.versions() if self._checkpoints() else versions
        said = set(versions) - {"command", "started"}
        changed = {key: versions[key] for key in said if first.get(key) != versions[key]}
        if changed:
            first = {**first, "continued": ", ".join(f"{key} {value}" for key, value in sorted(changed.items()))}
        if first != self.versions():
            write_json(self.path / VERSIONS, first)

    def _setting(self) -> dict[str, Any]:
        found = read_json(self.path / CONFIG)
        if found.get("format") != FORMAT:
            raise RunError(
                f"{self.path} has format {found.get('format')!r}; this version reads format {FORMAT}: "
                "use the spectreg version that wrote it, or delete the folder and run again"
            )
        return found["config"]

    def config(self) -> Config:
        """The run's setting, as it was recorded."""
        if not (self.path / CONFIG).exists():
            raise RunError(f"{self.path} is not a run folder: it has no {CONFIG}")
        return Config.model_validate(self._setting())

    def versions(self) -> dict[str, Any]:
        """Versions, machine, commit and command of the process that began the run; empty if none were recorded."""
        path = self.path / VERSIONS
        return read_json(path) if path.exists() else {}

    def append(self, line: dict[str, Any]) -> None:
        """Add one epoch to the metrics."""
        self._check_claim()
        with (self.path / METRICS).open("ab") as file:
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs recorded so far, in order; a line cut short by a kill ends the list.

        Raises:
            RunError: a line that was not cut short tells no epoch.
        """
        path = self.path / METRICS
        lines: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                found = json.loads(line)
            except ValueError:
                break
            if not isinstance(found, dict) or not isinstance(found.get("epoch"), int):
                raise RunError(f"{path}: line {len(lines) + 1} has no epoch: {RUN_AGAIN}")
            lines.append(found)
        return lines

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and keep the one before it."""
        self._check_claim()
        metadata = {"format": str(FORMAT), "epoch": str(checkpoint.epoch)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        write(self.path / f"checkpoint-{checkpoint.epoch}.safetensors", save(tensors, metadata))
        for old in self._checkpoints()[2:]:
            old.unlink()

    def _checkpoints(self) -> list[Path]:
        found = self.path.glob("checkpoint-*.safetensors")
        return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]), reverse=True)

    def resume(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, with the metrics cut back to its epoch; None to start anew.

        A truncated checkpoint is passed over for the one before it and deleted; epochs run again give the same numbers.
        """
        self._check_claim()
        for path in self._checkpoints():
            try:
                checkpoint = _read_checkpoint(path)
            except (SafetensorError, struct.error, KeyError, OSError):
                path.unlink()
                continue
            if len(self.metrics()) < checkpoint.epoch:
                continue
            self._keep_until(checkpoint.epoch)
            return checkpoint
        self._keep_until(0)
        return None

    def _keep_until(self, epoch: int) -> None:
        lines = [json.dumps(line) + "\n" for line in self.metrics() if line["epoch"] <= epoch]
        write(self.path / METRICS, "".join(lines).encode())

    def end(self, status: str, **details: Any) -> None:
        """Record the outcome: ``finished``, or ``failed`` with its cause. A finished run keeps one checkpoint."""
        self._check_claim()
        write_json(self.path / OUTCOME, {"status": status, **details})
        for old in self._checkpoints()[1:]:
            old.unlink()

    def save_measures(self, measures: dict[str, Any]) -> None:
        """Record what was measured of the finished run."""
        self._check_claim()
        write_json(self.path / MEASURES, measures)

    def measures(self) -> dict[str, Any] | None:
        """What was measured of the finished run; None before that."""
        path = self.path / MEASURES
        return read_json(path, MEASURE_AGAIN) if path.exists() else None

    def outcome(self) -> dict[str, Any] | None:
        """What became of the run; None while it is unfinished."""
        path = self.path / OUTCOME
        if not path.exists():
            return None
        found = read_json(path)
        if "status" not in found:
            raise RunError(f"{path} has no status: {RUN_AGAIN}")
        return found

    def ended(self) -> int | None:
        """When the outcome was recorded, in nanoseconds of the file system's clock; None while there is none."""
        try:
            return (self.path / OUTCOME).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def finished(self) -> bool:
        """Whether the run has ended well and has the numbers of all its epochs."""
        return (self.outcome() or {}).get("status") == "finished" and not self.lost()

    def lost(self) -> int:
        """How many of the run's epochs have no numbers on disk."""
        return max(self.config().epochs - len(self.metrics()), 0)


def _read_checkpoint(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        return Checkpoint(int(file.metadata()["epoch"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


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


def run_folder(study: Path, run: str) -> Path:
    """Where the run of that name lies in a study folder."""
    return study / RUNS / run


def finished_runs(folder: Path) -> list[Path]:
    """The folders of all finished runs in or below ``folder``."""
    places = sorted(path.parent for path in folder.rglob(OUTCOME))
    return [place for place in places if (RunFolder(place).outcome() or {}).get("status") == "finished"]


def study_name(folder: Path) -> str | None:
    """The name of the study in ``folder``; None where there is none, or none that can be read."""
    try:
        found = read_json(folder / STUDY)
    except (FileNotFoundError, RunError):
        return None
    return found["study"].get("name") if isinstance(found.get("study"), dict) else None


def begin_study(folder: Path, study: dict[str, Any], points: list[dict[str, Any]], command: str) -> None:
    """Record which runs make up a study: each point has ``setting``, ``regime``, ``method``, ``seed`` and ``run``."""
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    write_json(folder / STUDY, {"format": FORMAT, "command": command, "study": study, "points": points})


def read_study(folder: Path) -> StudyRecord:
    """Read a study folder, whatever state its runs are in; needs neither the data nor the weights."""
    if not (folder / STUDY).exists():
        raise RunError(f"{folder} is not a study folder: it has no {STUDY}; `spectreg reproduce` makes one")
    found = read_json(folder / STUDY, REWRITTEN)
    if "format" in found and found["format"] != FORMAT:
        raise RunError(f"{folder / STUDY} has format {found['format']!r}; this version reads format {FORMAT}")
    try:
        runs = [_read_run(folder / RUNS, **point) for point in found["points"]]
        search = (folder / SEARCH).read_text() if (folder / SEARCH).exists() else None
        return StudyRecord(folder, {**found["study"], "command": found["command"]}, runs, search)
    except (KeyError, TypeError) as error:
        raise RunError(f"{folder / STUDY} is not the record of a study ({error}): {REWRITTEN}") from None


def _read_run(folder: Path, *, setting: str, regime: str, method: str, seed: int, run: str) -> RunRecord:
    point = RunFolder(folder / run)
    label = (setting, regime, method, seed, point.path)
    if not (point.path / CONFIG).exists():
        return RunRecord(*label, "missing", None, {}, {}, [], {})
    try:
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

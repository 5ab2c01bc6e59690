"""The run folder: the only module that knows the names of its files.

It holds ``config.json`` (the setting), ``versions.json``, ``metrics.jsonl`` (one line an epoch), one or two
``checkpoint-N.safetensors``, ``outcome.json`` once the run has ended, ``measures.json`` once it has been measured and,
while a process works on it, that process's claim (`spectreg_lab.storage.claims`). Nothing in it executes when it is
read. Every file but ``metrics.jsonl`` is written under a temporary name and renamed. An epoch's line comes before its
checkpoint, and lines newer than the checkpoint are dropped on resuming: a kill costs an epoch, never consistency. Only
`RunFolder.resume`, for a run that is to be trained, drops anything; all other reading leaves the folder as it is.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from spectreg_lab.settings.config import Config
from spectreg_lab.storage import checkpoints, numbers, records
from spectreg_lab.storage.checkpoints import FORMAT, Checkpoint, DamagedCheckpointError
from spectreg_lab.storage.claims import Claim, claim
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.files import write

CONFIG, VERSIONS, METRICS, OUTCOME = "config.json", "versions.json", "metrics.jsonl", "outcome.json"
MEASURES = "measures.json"
TEMPORARY = re.compile(r"\.(checkpoint-[0-9]+\.safetensors|[a-z]+\.jsonl?)\.[0-9a-f]{12}")
CHECKPOINT, DAMAGED = re.compile(r"checkpoint-([0-9]{1,18})\.safetensors"), ".damaged"

RUN_AGAIN = "delete its folder and run again"
MEASURE_AGAIN = "delete it and `spectreg measure` its run again, which needs its weights"


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON."""
    write(path, (numbers.dumps(content, indent=2) + "\n").encode())


def read_json(
    path: Path,
    kind: type[BaseModel] = records.Record,
    remedy: str = RUN_AGAIN,
    parse: Callable[[bytes], Any] = json.loads,
) -> dict[str, Any]:
    """Read a JSON file that holds a record of that ``kind``.

    Raises:
        RunError: it does not; the message names the file and the ``remedy``.
    """
    try:
        content = parse(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object: {remedy}")
    if fault := records.fault(kind, content):
        raise RunError(f"{path} {fault}: {remedy}")
    return content


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
        if not (self.path / CONFIG).exists():
            write_json(self.path / CONFIG, {"format": FORMAT, "config": config.model_dump(mode="json")})
            write_json(self.path / VERSIONS, versions)
            return
        if (recorded := self.config()) != config:
            differing = sorted(name for name, value in config if getattr(recorded, name) != value)
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

    def _setting(self) -> Any:
        content = read_json(self.path / CONFIG)
        if content.get("format") != FORMAT:
            raise RunError(
                f"{self.path} has format {content.get('format')!r}; this version reads format {FORMAT}: "
                "use the spectreg version that wrote it, or delete the folder and run again"
            )
        return content.get("config")

    def config(self) -> Config:
        """The run's setting, as it was recorded."""
        if not (self.path / CONFIG).exists():
            raise RunError(f"{self.path} is not a run folder: it has no {CONFIG}")
        try:
            return Config.model_validate(self._setting())
        except ValidationError as error:
            place, cause = self.path / CONFIG, records.first(error)
            raise RunError(f"{place} holds no setting of a run ({cause}): {RUN_AGAIN}") from None

    def versions(self) -> dict[str, Any]:
        """Versions, machine, commit and command of the process that began the run; empty if none were recorded."""
        path = self.path / VERSIONS
        return read_json(path) if path.exists() else {}

    def append(self, line: dict[str, Any]) -> None:
        """Add one epoch to the metrics."""
        self._check_claim()
        with (self.path / METRICS).open("ab") as file:
            file.write((numbers.dumps(line) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs recorded so far, in order; a last line cut short by a kill is left out.

        Raises:
            RunError: a line that was not cut short is no epoch's, or not the next one's.
        """
        path = self.path / METRICS
        lines: list[dict[str, Any]] = []
        recorded = path.read_bytes().splitlines() if path.exists() else []
        for number, line in enumerate(recorded, 1):
            try:
                epoch = numbers.loads(line)
            except ValueError:
                if number == len(recorded):
                    break
                raise RunError(f"{path}: line {number} is damaged: {RUN_AGAIN}") from None
            if not isinstance(epoch, dict) or epoch.get("epoch") != number:
                raise RunError(f"{path}: line {number} has no epoch {number}: {RUN_AGAIN}")
            if fault := records.fault(records.Line, epoch):
                raise RunError(f"{path}: line {number} {fault}: {RUN_AGAIN}")
            lines.append(epoch)
        return lines

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and keep the one before it."""
        self._check_claim()
        checkpoints.write(self.path / f"checkpoint-{checkpoint.epoch}.safetensors", checkpoint)
        epochs = self._checkpoints()
        kept = sorted(epoch for epoch in epochs if epoch <= checkpoint.epoch)[-2:]
        self._delete(path for epoch, path in epochs.items() if epoch not in kept)

    def _checkpoints(self) -> dict[int, Path]:
        """The checkpoints by epoch, newest first."""
        named = [(CHECKPOINT.fullmatch(path.name), path) for path in self.path.glob("checkpoint-*")]
        return dict(sorted(((int(name[1]), path) for name, path in named if name), reverse=True))

    def _left_over(self) -> list[Path]:
        """Files under the temporary names of writes that were killed."""
        return [path for path in self.path.glob(".*") if TEMPORARY.fullmatch(path.name)]

    def _delete(self, paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def resume(self) -> Checkpoint | None:
        """The newest checkpoint to train on from, with the metrics cut back to its epoch; None to start anew.

        A damaged checkpoint is set aside, which is said, and the one before it is used; epochs run again give the same
        numbers.

        Raises:
            OSError: a checkpoint cannot be read now, whatever is in it; nothing is changed.
        """
        self._check_claim()
        self._delete(self._left_over())
        for epoch, path in self._checkpoints().items():
            try:
                checkpoint = self._read(epoch, path)
            except DamagedCheckpointError as error:
                logging.warning("%s is damaged (%s) and set aside: the run goes on from the one before it", path, error)
                path.replace(path.with_suffix(DAMAGED))
                continue
            if len(self.metrics()) >= epoch:
                self._keep_until(epoch)
                return checkpoint
        self._keep_until(0)
        return None

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, None where there is none at all; nothing in the folder changes.

        Raises:
            OSError: a checkpoint cannot be read now, whatever is in it.
            RunError: all of them are damaged.
        """
        damaged = None
        for epoch, path in self._checkpoints().items():
            try:
                return self._read(epoch, path)
            except DamagedCheckpointError as error:
                damaged = damaged or f"{path} is damaged ({error}): run it in another folder"
        if damaged:
            raise RunError(damaged)
        return None

    def _read(self, epoch: int, path: Path) -> Checkpoint:
        checkpoint = checkpoints.read(path)
        if checkpoint.epoch != epoch or not epoch:
            raise DamagedCheckpointError(f"it says epoch {checkpoint.epoch}")
        return checkpoint

    def _keep_until(self, epoch: int) -> None:
        lines = [numbers.dumps(line) + "\n" for line in self.metrics() if line["epoch"] <= epoch]
        write(self.path / METRICS, "".join(lines).encode())

    def end(self, status: str, **details: Any) -> None:
        """Record the outcome: ``finished``, or ``failed`` with its cause. A finished run keeps one checkpoint."""
        self._check_claim()
        write_json(self.path / OUTCOME, {"status": status, **details})
        if status == "finished":
            self._delete([*list(self._checkpoints().values())[1:], *self.path.glob(f"*{DAMAGED}")])

    def save_measures(self, measures: dict[str, Any]) -> None:
        """Record what was measured of the finished run."""
        self._check_claim()
        write_json(self.path / MEASURES, measures)

    def measures(self) -> dict[str, Any] | None:
        """What was measured of the finished run; None before that."""
        path = self.path / MEASURES
        return read_json(path, records.Measures, MEASURE_AGAIN, numbers.loads) if path.exists() else None

    def outcome(self) -> dict[str, Any] | None:
        """What became of the run; None while it is unfinished."""
        path = self.path / OUTCOME
        return read_json(path, records.Outcome) if path.exists() else None

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

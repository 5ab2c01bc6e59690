"""How far a study is, from its folder alone: so from any machine that sees the folder, and for any engine."""

import os
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from spectreg_lab.storage.claims import Watch
from spectreg_lab.storage.progress import Progress, progress
from spectreg_lab.storage.records import StudyFile
from spectreg_lab.storage.run_folder import read_json
from spectreg_lab.storage.store import REWRITTEN, RUNS, STUDY, check_is_study


@dataclass(frozen=True)
class Row:
    """A run of the study: what the study calls it, how many epochs it is to have, how far it is."""

    name: str
    group: str
    epochs: int
    progress: Progress
    alive: bool | None = None

    @property
    def state(self) -> str:
        """``running``, ``finished``, ``failed`` or ``waiting`` (not begun, or interrupted)."""
        if self.progress.owner is not None and self.alive is not False:
            return "running"
        return self.progress.status if self.progress.status in ("finished", "failed") else "waiting"


class Overview:
    """A study folder, read again and again: runs that are finished are read once."""

    def __init__(self, folder: Path, only: Collection[str] | None = None) -> None:
        check_is_study(folder)
        self.folder, self._watch = folder, Watch()
        record = read_json(folder / STUDY, StudyFile, REWRITTEN)
        self.name = str(record["study"]["name"])
        points = [point for point in record["points"] if only is None or point["run"] in only]
        self.rows = {point["run"]: _row(record["study"], point) for point in points}
        self._pace = self._measured()

    def refresh(self) -> None:
        """Read what may have changed."""
        there: set[str] = set()
        with suppress(FileNotFoundError), os.scandir(self.folder / RUNS) as entries:
            there = {entry.name for entry in entries}
        for run, row in self.rows.items():
            if run in there and row.state != "finished":
                progress_now = progress(self.folder / RUNS / run)
                seen = progress_now.owner and self._watch.observe(self.folder / RUNS / run)
                self.rows[run] = replace(row, progress=progress_now, alive=seen.alive if seen else None)
        self._pace = self._measured()

    def of(self, state: str) -> list[Row]:
        """The runs in a state, in the study's order."""
        return [row for row in self.rows.values() if row.state == state]

    def left(self) -> float | None:
        """Seconds until all is done, at the pace so far and with as many runs at a time as now; None if unknown."""
        pace, running = self._pace, self.of("running")
        longest = [_left(row, pace) for row in running]
        spans = [*longest, *(_left(row, pace) for row in self.of("waiting"))]
        known = [span for span in spans if span is not None]
        if not running or len(known) < len(spans):
            return None
        return max(sum(known) / len(running), *known[: len(running)])  # no run is shared out

    def left_of(self, row: Row) -> float | None:
        """Seconds until a run is done."""
        return _left(row, self._pace)

    def _measured(self) -> Callable[[str], float | None]:
        """Seconds an epoch of the runs of a group; of all runs where the group has none that tells."""
        known: dict[str, list[float]] = {}
        for row in self.rows.values():
            if (seconds := _epoch(row)) is not None:
                known.setdefault(row.group, []).append(seconds)
        groups = {group: median(values) for group, values in known.items()}
        of_all = median(groups.values()) if groups else None
        return lambda group: groups.get(group, of_all)


def _row(study: dict[str, Any], point: dict[str, Any]) -> Row:
    case = (study.get("settings") or {}).get(point["setting"]) or {}
    epochs = case.get("epochs") or study.get("epochs", 0)
    group = f"{point['setting']} {point['regime']} {point['method']}"
    return Row(f"{group} seed {point['seed']}", group, epochs, Progress())


def _epoch(row: Row) -> float | None:
    """Seconds an epoch of this run."""
    seconds, status = row.progress.seconds, row.progress.status
    if seconds is None or status == "failed" or row.epochs < 1:
        return None
    return seconds / row.epochs if status == "finished" else seconds


def _left(row: Row, pace: Callable[[str], float | None]) -> float | None:
    seconds = row.progress.seconds if row.progress.status == "unfinished" else None
    if seconds is None:
        seconds = pace(row.group)
    return None if seconds is None else seconds * max(row.epochs - row.progress.epoch, 0)

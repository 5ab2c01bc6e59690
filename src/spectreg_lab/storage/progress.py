"""How far a run has come, read from its folder in a millisecond: names and times of files, hardly any content."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spectreg_lab.storage.claims import Owner, holder
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.run_folder import CHECKPOINT, CONFIG, OUTCOME, RunFolder


@dataclass(frozen=True)
class Progress:
    """``status`` is ``finished``, ``failed``, ``unfinished`` or ``missing``; ``epoch`` the last one stored.

    ``seconds`` are those between the last two epochs, from beginning to end for a run that has ended; None where that
    cannot be told. ``owner`` is who is working on it.
    """

    status: str = "missing"
    epoch: int = 0
    seconds: float | None = None
    error: str | None = None
    owner: Owner | None = None


def progress(folder: Path) -> Progress:
    """Read the run in ``folder``, whatever state it is in."""
    try:
        with os.scandir(folder) as entries:
            files = {entry.name: entry for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return Progress()
    owner = holder(folder) if any(name.startswith("claim-") for name in files) else None
    if OUTCOME in files and owner is None:
        return _ended(folder, files)
    if CONFIG not in files:
        return Progress(owner=owner)
    stored = sorted((int(match[1]), entry) for name, entry in files.items() if (match := CHECKPOINT.fullmatch(name)))
    return Progress("unfinished", stored[-1][0] if stored else 0, _seconds(stored), owner=owner)


def _ended(folder: Path, files: dict[str, "os.DirEntry[str]"]) -> Progress:
    try:
        outcome = RunFolder(folder).outcome() or {}
    except RunError as error:
        return Progress("unfinished", error=str(error))
    span = None
    with suppress(KeyError, FileNotFoundError):
        span = files[OUTCOME].stat().st_mtime - files[CONFIG].stat().st_mtime
    return Progress(outcome.get("status", "unfinished"), seconds=span, error=outcome.get("error"))


def _seconds(stored: list[tuple[int, "os.DirEntry[str]"]]) -> float | None:
    """Between the last two checkpoints, by the file system's clock; a run keeps two."""
    if len(stored) < 2:
        return None
    (before, older), (last, newer) = stored[-2:]
    try:
        return (newer.stat().st_mtime - older.stat().st_mtime) / (last - before)
    except FileNotFoundError:
        return None

"""How a study goes on, for people: a live table in a terminal, a line for every run that ends in a log."""

import time
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spectreg_lab.settings.studies import Point
from spectreg_lab.storage.claims import Owner
from spectreg_lab.studies.status import Overview, Row

SHOWN = {"running": 40, "failed": 12}  # runs that are listed; the others are counted
REFRESH = 1.0  # seconds


def picture(overview: Overview) -> RenderableType:
    """The study as it stands: how many runs are done, each one that is running, those that failed and why."""
    running, failed = overview.of("running"), overview.of("failed")
    parts: list[RenderableType] = [Text(summary(overview)), _bar(overview), ""]  # a bar ends no line
    if running:
        table = Table("running", "epoch", "left", "where", box=None, header_style="bold", pad_edge=False)
        for row in running[: SHOWN["running"]]:
            epoch = f"{row.progress.epoch}/{row.epochs}"
            table.add_row(Text(row.name), epoch, _time(overview.left_of(row)), Text(str(row.progress.owner)))
        parts += [table, *_more("running", running)]
    if failed:
        table = Table("failed", "cause", box=None, header_style="bold red", pad_edge=False)
        for row in failed[: SHOWN["failed"]]:
            table.add_row(Text(row.name), Text(row.progress.error or "no cause recorded"))
        parts += ["", table, *_more("failed", failed)]
    return Group(*parts)


def _more(state: str, rows: list[Row]) -> list[RenderableType]:
    return [f"and {len(rows) - SHOWN[state]} more"] if len(rows) > SHOWN[state] else []


def summary(overview: Overview) -> str:
    """One line: how many runs are in which state, and the time left."""
    counts = {state: len(overview.of(state)) for state in ("finished", "running", "waiting", "failed")}
    text = f"{overview.name}: {len(overview.rows)} runs, " + ", ".join(f"{n} {state}" for state, n in counts.items())
    left = _time(overview.left())
    return f"{text}, {left} left" if left else text


def follow(overview: Overview, console: Console) -> None:
    """Show the study until nothing of it is left to do."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            overview.refresh()
            live.update(picture(overview), refresh=True)
            if not overview.of("running") and not overview.of("waiting"):
                return
            time.sleep(REFRESH)


def _bar(overview: Overview) -> ProgressBar:
    done = sum(row.progress.epoch if row.state != "finished" else row.epochs for row in overview.rows.values())
    return ProgressBar(sum(row.epochs for row in overview.rows.values()), done, width=60)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


class StudyDisplay(AbstractContextManager["StudyDisplay"]):
    """Shows a study to the process that carries it out."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.failed: list[str] = []
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._overview: Overview | None = None
        self._runs = self._ended = 0
        self._ticked = 0.0

    def __enter__(self) -> "StudyDisplay":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line of text."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def begin(self, points: list[Point], done: int) -> None:
        """How many runs there are to do."""
        self._runs = len(points)
        self.note(f"{len(points)} runs to do" + (f", {done} finished before" if done else ""))

    def watch(self, folder: Path, runs: list[str]) -> None:
        """Show how far these runs are in the study's folder."""
        self._overview = Overview(folder, set(runs))

    def tick(self) -> None:
        """Look at the folder again, where anybody sees the table and some time has passed."""
        if self._live is not None and self._overview is not None and time.monotonic() - self._ticked > REFRESH:
            self._overview.refresh()
            self._live.update(picture(self._overview), refresh=True)
            self._ticked = time.monotonic()

    def end(self, point: Point, status: str, error: str | None) -> None:
        """A run has ended, here or elsewhere."""
        self._ended += 1
        if status == "failed":
            self.failed.append(f"{point}: {error}")
            self.note(f"failed: {self.failed[-1]}")
        elif self._live is None:
            self.note(f"{self._ended}/{self._runs} {point}{self._left()}")

    def leave(self, point: Point, owner: Owner | None) -> None:
        """A run is left to another process."""
        self.note(f"{point}: left to {owner or 'another process'}, which is working on it")

    def _left(self) -> str:
        if self._overview is None:
            return ""
        self._overview.refresh()
        left = _time(self._overview.left())
        return f", {left} left" if left else ""

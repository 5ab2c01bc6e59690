"""How a study goes on, for people: a live bar with the time left in a terminal, plain lines in a log."""

import time
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from spectreg_lab.settings.studies import Point

COST = {"adversarial": 2.5}  # of an epoch, in epochs of plain training: two forwards, two and a half backwards


class StudyDisplay(AbstractContextManager["StudyDisplay"]):
    """Shows runs, epochs and time left; in a log, one line for every run that ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.failed: list[str] = []
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._start, self._done, self._total = time.monotonic(), 0.0, 0.0
        self._runs = self._ended = 0
        self._seen: dict[Point, int] = {}
        self._task: TaskID | None = None

    def __enter__(self) -> "StudyDisplay":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """A line of text."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def begin(self, points: list[Point], done: int) -> None:
        """How many runs there are to do."""
        self._runs, self._start = len(points), time.monotonic()
        self._total = sum(_cost(point) * point.config.epochs for point in points)
        self.note(f"{len(points)} runs to do" + (f", {done} finished before" if done else ""))
        self._task = self._bar.add_task("runs", total=len(points), left="")

    def epoch(self, point: Point, metrics: dict[str, Any]) -> None:
        """An epoch is done; epochs read back from disk count as done, too."""
        self._done += _cost(point)
        self._seen[point] = metrics["epoch"]
        shown = f"{point}, epoch {metrics['epoch']}/{point.config.epochs}, test {metrics['test_accuracy']:.3f}"
        if self._task is not None:
            self._bar.update(self._task, description=shown, left=self._left())

    def end(self, point: Point, outcome: dict[str, Any]) -> None:
        """A run has ended; what it had left to do, if it failed, is not to come any more."""
        self._ended += 1
        self._total -= _cost(point) * (point.config.epochs - self._seen.get(point, 0))
        if self._task is not None:
            self._bar.update(self._task, advance=1)
        if outcome["status"] == "failed":
            self.failed.append(f"{point}: {outcome['error']}")
            self.note(f"failed: {self.failed[-1]}")
        elif not self.console.is_terminal:
            self.note(f"{self._ended}/{self._runs} {point} {self._left()}")

    def _left(self) -> str:
        if not self._done:
            return ""
        seconds = (time.monotonic() - self._start) * (self._total - self._done) / self._done
        return f"{timedelta(seconds=round(max(seconds, 0)))} left"


def _cost(point: Point) -> float:
    return COST.get(point.config.method.name, 1.0)

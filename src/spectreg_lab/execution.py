"""A study, carried out: its runs in parallel, finished ones skipped, failed ones recorded."""

from pathlib import Path
from typing import Any, Protocol

from spectreg_lab import data, models, store
from spectreg_lab.pool import Event, Job, Pool
from spectreg_lab.studies import Point, Study, StudyError


class Display(Protocol):
    """Who is told how a study goes on."""

    def note(self, text: str) -> None:
        """A line of text."""

    def begin(self, points: list[Point], done: int) -> None:
        """``points`` are to be run; ``done`` others are finished."""

    def epoch(self, point: Point, metrics: dict[str, Any]) -> None:
        """An epoch of a run is done."""

    def end(self, point: Point, outcome: dict[str, Any]) -> None:
        """A run has ended."""


class DiskFullError(Exception):
    """No space is left; everything finished is kept."""


def check(study: Study, display: Display) -> None:
    """Read the data and build each network once, so that what cannot work is said before the first run.

    Raises:
        StudyError: a setting's data cannot be had or its network does not fit it.
    """
    for name, case in study.settings.items():
        try:
            images = data.load(case.data, display.note)
            models.build(case.model, images.shape, images.classes)
        except (data.DataError, ValueError) as error:
            raise StudyError(f"settings.{name}: {error}") from error


def execute(study: Study, folder: Path, command: str, processes: int, threads: int, display: Display) -> None:
    """Do every run of ``study`` that ``folder`` does not hold finished already."""
    points = study.points()
    store.begin_study(folder, study.model_dump(mode="json"), [point.label() for point in points], command)
    by_folder = {store.run_folder(folder, point.config.name): point for point in points}
    waiting = {place: point for place, point in by_folder.items() if not _finished(place)}
    display.begin(list(waiting.values()), len(by_folder) - len(waiting))
    if not waiting:
        return
    check(study, display)
    with Pool(processes, threads) as pool:
        for event in pool.run([Job(point.config, place) for place, point in waiting.items()]):
            _tell(event, by_folder[event.job.folder], display)


def _finished(place: Path) -> bool:
    try:
        outcome = store.RunFolder(place).outcome()
    except store.RunError:
        return False
    return outcome is not None and outcome["status"] == "finished"


def _tell(event: Event, point: Point, display: Display) -> None:
    if event.kind == "epoch":
        display.epoch(point, event.content)
    elif event.kind == "ended":
        display.end(point, event.content)
    elif event.content.get("full"):
        raise DiskFullError(event.content["error"])
    elif event.content.get("retry"):
        display.note(f"{point}: {event.content['error']}; trying once more")
    else:
        if event.kind == "died":
            store.RunFolder(event.job.folder).end("failed", error=event.content["error"])
        display.end(point, {"status": "failed", **event.content})

"""A study, carried out: its runs in parallel, finished ones skipped, failed ones recorded."""

from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lightning_fabric import Fabric

from spectreg_lab import data, models
from spectreg_lab.settings.studies import Point, Selection, Study, StudyError
from spectreg_lab.storage import store
from spectreg_lab.studies.pool import Event, Job, Pool
from spectreg_lab.training.runs import run


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


EVERYTHING = Selection()


def begin(
    study: Study, folder: Path, command: str, display: Display, only: Selection = EVERYTHING
) -> dict[Path, Point]:
    """Record the study in ``folder`` and return the runs that are not finished there, of those that ``only`` means.

    Nothing is written before it is known that the study can be carried out here.

    Raises:
        StudyError: `check` finds a fault, ``only`` names what the study does not have, or the folder is
            another study's.
    """
    chosen = {store.run_folder(folder, point.config.name): point for point in only.of(study)}
    if (other := store.study_name(folder)) not in (None, study.name):
        raise StudyError(f"{folder} holds the study {other!r}: give {study.name!r} another folder with --out")
    waiting = {place: point for place, point in chosen.items() if not _finished(place)}
    display.begin(list(waiting.values()), len(chosen) - len(waiting))
    if waiting:
        check(study, display)
    store.begin_study(folder, study.model_dump(mode="json"), [point.label() for point in study.points()], command)
    return waiting


def execute(waiting: dict[Path, Point], pool: Pool, display: Display) -> None:
    """Do the runs that `begin` returned, several at a time."""
    with pool:
        for event in pool.run([Job(point.config, place) for place, point in waiting.items()]):
            _tell(event, waiting[event.job.folder], display)


def execute_together(waiting: dict[Path, Point], fabric: Fabric, display: Display) -> None:
    """Do the runs one after the other, each on all processes of ``fabric``; every process calls this."""
    for place, point in waiting.items():
        display.end(point, run(point.config, place, fabric, partial(display.epoch, point)))


def _finished(place: Path) -> bool:
    try:
        return store.RunFolder(place).finished()
    except (store.RunError, ValueError):
        return False


def _tell(event: Event, point: Point, display: Display) -> None:
    if event.kind == "epoch":
        display.epoch(point, event.content)
    elif event.kind == "ended":
        display.end(point, event.content)
    elif event.content.get("full"):
        raise DiskFullError(
            f"{event.content['error']}: free some space and give the same command again; what is finished is kept"
        )
    elif event.content.get("retry"):
        display.note(f"{point}: {event.content['error']}; trying once more")
    else:
        if event.kind == "died":
            store.RunFolder(event.job.folder).end("failed", error=event.content["error"])
        display.end(point, {"status": "failed", **event.content})

"""A study, carried out: its runs side by side, finished ones skipped, failed ones recorded, others' left to them."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pandas as pd
from lightning_fabric import Fabric

from spectreg_lab import data, models
from spectreg_lab.settings.studies import Point, Selection, Study, StudyError
from spectreg_lab.storage import run_folder, store
from spectreg_lab.storage.claims import ClaimedError, Owner, Watch, holder
from spectreg_lab.storage.errors import RunError
from spectreg_lab.studies.search import keep
from spectreg_lab.studies.worker import Engine, Job, Outcome
from spectreg_lab.training.runs import run

LOOK = 1.0  # seconds between two looks at others' runs


class Display(Protocol):
    """Who is told how a study goes on."""

    def note(self, text: str) -> None:
        """A line of text."""

    def begin(self, points: list[Point], done: int) -> None:
        """``points`` are to be run; ``done`` others are finished."""

    def watch(self, folder: Path, runs: list[str]) -> None:
        """The runs have these names in this study's folder, which has been written."""

    def tick(self) -> None:
        """A moment has passed."""

    def end(self, point: Point, status: str, error: str | None) -> None:
        """A run has ended, here or elsewhere."""

    def leave(self, point: Point, owner: Owner | None) -> None:
        """A run is left to another process that is working on it."""


class UnwritableError(Exception):
    """The study's folder cannot be written; everything finished is kept."""


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
    study: Study,
    folder: Path,
    command: str,
    display: Display,
    only: Selection = EVERYTHING,
    searched: pd.DataFrame | None = None,
) -> dict[Path, Point]:
    """Record the study in ``folder`` and return the runs that are not finished there, of those that ``only`` means.

    ``searched`` is the table of the searches that chose the study's settings. Nothing is written before it is known
    that the study can be carried out here.

    Raises:
        StudyError: `check` finds a fault, ``only`` names what the study does not have, or the folder is
            another study's.
    """
    chosen = {store.find_run(folder, *point.config.names): point for point in only.of(study)}
    if (other := store.study_name(folder)) not in (None, study.name):
        raise StudyError(f"{folder} holds the study {other!r}: give {study.name!r} another folder with --out")
    waiting = {place: point for place, point in chosen.items() if not _finished(place)}
    display.begin(list(waiting.values()), len(chosen) - len(waiting))
    if waiting:
        check(study, display)
    labels = [_label(folder, point) for point in study.points()]
    store.begin_study(folder, study.model_dump(mode="json"), labels, command)
    keep(searched, folder)
    display.watch(folder, [place.name for place in waiting])
    return waiting


def _label(folder: Path, point: Point) -> dict[str, object]:
    return point.label() | {"run": store.find_run(folder, *point.config.names).name}


def execute(waiting: dict[Path, Point], engine: Engine, display: Display, log: tuple[str, ...] = ()) -> None:
    """Do the runs that `begin` returned and that nobody else is doing, and tell the loggers named ``log``.

    Raises:
        UnwritableError: the disk is full, or the folder cannot be written.
    """
    with engine:
        Execution(waiting, engine, display, log).go()


class Execution:
    """One process's part in a study. Those of others are looked at until each is known to be in good hands."""

    def __init__(self, waiting: dict[Path, Point], engine: Engine, display: Display, log: tuple[str, ...] = ()) -> None:
        self.points, self.engine, self.display, self.log = waiting, engine, display, log
        self.elsewhere: dict[Path, Job] = {}
        self.watch = Watch()
        self._looked = 0.0

    def go(self) -> None:
        """Do all that there is to do."""
        jobs = [
            Job(point.config, place, run_folder.RunFolder(place).ended(), log=self.log)
            for place, point in self.points.items()
        ]
        while jobs:
            for outcome in self.engine.run(self._free(jobs)):
                if outcome is not None:
                    self._tell(outcome)
                self._look()
            jobs = self._abandoned()
        for place in self.elsewhere:
            self.display.leave(self.points[place], holder(place))

    def _free(self, jobs: list[Job]) -> Iterator[Job]:
        """Those of ``jobs`` that nobody has when their turn comes."""
        for job in jobs:
            if self._over(job):
                continue
            seen = self.watch.observe(job.folder)
            if seen is None:
                yield job
            elif seen.alive is False:
                yield replace(job, dead=(*job.dead, seen.owner.token))
            else:
                self.elsewhere[job.folder] = job

    def _over(self, job: Job) -> bool:
        """Whether another process has brought the run to its end."""
        recorded = run_folder.RunFolder(job.folder).ended()
        if recorded is None or recorded == job.failure:
            return False
        status, error = _recorded(job.folder)
        if status == "failed" or _finished(job.folder):
            self.display.end(self.points[job.folder], status, error)
            return True
        return False

    def _look(self) -> None:
        self.display.tick()
        if time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            for place in self.elsewhere:
                self.watch.observe(place)

    def _abandoned(self) -> list[Job]:
        """Others' runs that nobody works on any more; waits until it can be told of each."""
        while True:
            self.elsewhere = {place: job for place, job in self.elsewhere.items() if not self._over(job)}
            seen = {place: self.watch.observe(place) for place in self.elsewhere}
            free = [place for place, state in seen.items() if state is None or state.alive is False]
            if free or all(state is None or state.alive for state in seen.values()):
                return [self.elsewhere.pop(place) for place in free]
            time.sleep(LOOK)
            self.display.tick()

    def _tell(self, outcome: Outcome) -> None:
        job, point = outcome.job, self.points[outcome.job.folder]
        if outcome.status == "unwritable":
            raise UnwritableError(
                f"{outcome.error}: mend that and give the same command again; what is finished is kept"
            )
        if outcome.status == "retried":
            self.display.note(f"{point}: {outcome.error}; trying once more")
        elif outcome.status == "elsewhere":
            self.elsewhere[job.folder] = job
        elif outcome.status == "died":
            self._record(job, outcome.error)
        else:
            self.display.end(point, outcome.status, outcome.error)

    def _record(self, job: Job, error: str | None) -> None:
        place = run_folder.RunFolder(job.folder)
        try:
            with place.claimed(token=job.token, dead=job.dead):
                place.end("failed", error=error)
        except ClaimedError:
            self.elsewhere[job.folder] = job
        else:
            self.display.end(self.points[job.folder], "failed", error)


def execute_together(waiting: dict[Path, Point], fabric: Fabric, display: Display) -> None:
    """Do the runs one after the other, each on all processes of ``fabric``; every process calls this."""
    for place, point in waiting.items():
        try:
            outcome = run(point.config, place, fabric, lambda _: display.tick())
        except ClaimedError:
            display.leave(point, None)
        else:
            display.end(point, outcome["status"], outcome.get("error"))


def _finished(place: Path) -> bool:
    try:
        return run_folder.RunFolder(place).finished()
    except (RunError, ValueError):
        return False


def _recorded(place: Path) -> tuple[str, str | None]:
    """The status and the error that a run's folder records; a broken record is no end."""
    try:
        outcome = run_folder.RunFolder(place).outcome() or {}
    except RunError:
        outcome = {}
    return outcome.get("status", "unfinished"), outcome.get("error")

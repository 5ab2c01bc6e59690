"""A job and what becomes of it in the process that carries it out: the same for every engine.

Torch is imported by the functions that need it: a new process has first to be told its GPU and its threads.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from spectreg_lab.settings.config import Config

if TYPE_CHECKING:
    from spectreg_lab.storage.run_folder import RunFolder

Status = Literal["finished", "failed", "elsewhere", "unwritable", "retried", "died"]


@dataclass(frozen=True)
class Job:
    """A run to be done, in a folder.

    ``token`` marks the claim of this ``attempt`` and ``dead`` those of processes that ended without releasing theirs.
    ``failure`` is when the run had failed before the study was begun: it is tried again, while a later failure is
    another process's and stands. ``shunned`` are the nodes where attempts ended so; ``log`` names loggers.
    """

    config: Config
    folder: Path
    failure: int | None = None
    dead: tuple[str, ...] = ()
    attempt: int = 1
    shunned: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def again(self, node: str | None = None, counts: bool = True) -> "Job":
        """The same job after the process that had it is gone; on another ``node`` than that, if there is one."""
        return replace(
            self,
            token=uuid.uuid4().hex,
            dead=(*self.dead, self.token),
            attempt=self.attempt + counts,
            shunned=(*self.shunned, node) if node else self.shunned,
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    ``finished`` or ``failed`` as the run's folder records it; ``elsewhere``: another process has the run;
    ``unwritable``: the folder could not be written or read, or a logger not be told; ``retried``: its process died
    and another one goes on; ``died``: that happened too often.
    """

    job: Job
    status: Status
    error: str | None = None


class Engine(Protocol):
    """What carries jobs out; a context manager, on whose exit none is being carried out any more."""

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *exception: object) -> None: ...

    def run(self, jobs: Iterator[Job]) -> Iterator[Outcome | None]:
        """Carry out ``jobs``, each asked for when there is room for it; None now and then while nothing happens."""


def carry_out(job: Job, accelerator: str = "cpu", threads: int = 1, node: str | None = None) -> Outcome:
    """Do a job in this process. Only errors of the run itself are recorded in its folder."""
    import torch

    from spectreg_lab.storage.claims import ClaimedError, ClaimLostError
    from spectreg_lab.storage.errors import RunError
    from spectreg_lab.storage.run_folder import RunFolder
    from spectreg_lab.studies.loggers import LogError

    torch.set_num_threads(threads)
    place = RunFolder(job.folder)
    try:
        with place.claimed(token=job.token, dead=job.dead, node=node):
            return _claimed(job, place, accelerator)
    except (ClaimedError, ClaimLostError) as error:
        return Outcome(job, "elsewhere", str(error))
    except LogError as error:
        return Outcome(job, "unwritable", str(error))
    except RunError as error:
        return Outcome(job, "failed", str(error))
    except OSError as error:
        return Outcome(job, "unwritable", f"{type(error).__name__}: {error}")


def _claimed(job: Job, place: "RunFolder", accelerator: str) -> Outcome:
    from spectreg_lab.storage.errors import RunError
    from spectreg_lab.studies.loggers import loggers
    from spectreg_lab.training.devices import one_device
    from spectreg_lab.training.runs import go_on

    recorded = place.outcome() or {}
    if recorded.get("status") == "failed" and place.ended() != job.failure:
        return Outcome(job, "failed", recorded.get("error"))
    try:
        with loggers(job.log, job.config, job.folder) as on_epoch:
            outcome = go_on(job.config, place, one_device(accelerator, job.config.precision), on_epoch)
    except (RunError, OSError):
        raise
    except Exception as error:
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        place.end(**outcome)
    return Outcome(job, outcome["status"], outcome.get("error"))

"""Several runs at a time: one process a place, each with its own share of the cores.

A worker that dies, by whatever signal, takes nothing with it: its run goes on in a new one, once.
"""

import errno
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectreg_lab.settings.config import Config, Precision

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class DeviceError(Exception):
    """Devices that cannot be had; the message says which can."""


ATTEMPTS = 2
GRACE = 10  # seconds for an idle worker to leave


@dataclass(frozen=True)
class Job:
    """A run to be done, in a folder."""

    config: Config
    folder: Path


@dataclass(frozen=True)
class Event:
    """What became of a job: an ``epoch``'s metrics, the outcome it ``ended`` with, a run that cannot be done now
    (``error``), or a worker that ``died`` under it; with ``retry``, the job is tried once more.
    """

    kind: Literal["epoch", "ended", "error", "died"]
    job: Job
    content: dict[str, Any]


@dataclass
class Worker:
    """A process and the job it has."""

    process: BaseProcess
    connection: Connection
    job: Job | None = None


@dataclass
class Pool:
    """``processes`` workers of ``threads`` threads each; a context manager, on whose exit they are gone."""

    processes: int
    threads: int
    accelerator: str = "cpu"
    _workers: list[Worker] = field(default_factory=list)

    @classmethod
    def for_machine(cls, processes: int | None, threads: int | None, accelerator: str = "auto") -> "Pool":
        """A process of one thread for each core, which keeps a CPU busy with small networks; one on an accelerator.

        Raises:
            DeviceError: there is no such accelerator here.
        """
        import torch

        if accelerator == "auto":
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        _fabric(accelerator, devices=1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = threads or 1
        return cls(processes or (max(cores // threads, 1) if accelerator == "cpu" else 1), threads, accelerator)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.connection.close()  # an idle worker leaves by itself
        for worker in self._workers:
            worker.process.join(GRACE if exception[0] is None else 0)
            worker.process.kill()
            worker.process.join()

    def run(self, jobs: list[Job]) -> Iterator[Event]:
        """Do all jobs, in order; yields what happens as it happens."""
        waiting, attempts = deque(jobs), dict.fromkeys((job.folder for job in jobs), 0)
        self._workers = [self._start() for _ in range(min(self.processes, len(jobs)))]
        while waiting or any(worker.job for worker in self._workers):
            for worker in self._workers:
                if worker.job is None and waiting:
                    worker.job = waiting.popleft()
                    attempts[worker.job.folder] += 1
                    with suppress(OSError):
                        worker.connection.send(worker.job)
            busy = {worker.connection: worker for worker in self._workers if worker.job}
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                assert worker.job is not None
                try:
                    event: Event = worker.connection.recv()
                except (EOFError, OSError):
                    event = self._replace(worker, worker.job, waiting, attempts)
                if event.kind != "epoch":
                    worker.job = None
                yield event

    def _replace(self, worker: Worker, job: Job, waiting: deque[Job], attempts: dict[Path, int]) -> Event:
        worker.process.join()
        code = worker.process.exitcode
        self._workers[self._workers.index(worker)] = self._start()
        if attempts[job.folder] < ATTEMPTS:
            waiting.appendleft(job)
            return Event(
                "error", job, {"retry": True, "error": f"its process ended with {_cause(code)}; trying once more"}
            )
        return Event(
            "error", job, {"retry": False, "error": f"its process ended with {_cause(code)}, {ATTEMPTS} times"}
        )

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.threads, self.accelerator), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name} (out of memory?)" if name == "SIGKILL" else name
    return f"exit code {code}"


def _work(connection: Connection, threads: int, accelerator: str) -> None:
    """A worker's life: take a job, tell of each epoch and of the end; gone when nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    from lightning_fabric import Fabric

    from spectreg_lab.training.runs import run

    torch.set_num_threads(threads)
    with suppress(EOFError, OSError):
        while True:
            job: Job = connection.recv()

            def tell(metrics: dict[str, Any], job: Job = job) -> None:
                connection.send(Event("epoch", job, metrics))

            try:
                fabric = Fabric(accelerator=accelerator, devices=1, precision=job.config.precision)
                connection.send(Event("ended", job, run(job.config, job.folder, fabric, tell)))
            except BrokenPipeError:
                raise
            except Exception as error:
                full = isinstance(error, OSError) and error.errno == errno.ENOSPC
                connection.send(Event("error", job, {"full": full, "error": f"{type(error).__name__}: {error}"}))


def shape(devices: int | None, nodes: int | None) -> tuple[int, int]:
    """Devices of a machine and machines, of one run: what torchrun or Slurm has started, else what is asked for.

    Raises:
        DeviceError: something else is asked for than has been started.
    """
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    if started == 1:
        return devices or 1, nodes or 1
    machines = nodes or int(os.environ.get("SLURM_NNODES") or 1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or max(started // machines, 1))
    for option, asked, found in (("devices", devices, local), ("nodes", nodes, started // local)):
        if asked not in (None, found):
            raise DeviceError(
                f"--{option} {asked}, but {started} processes have been started, {local} on a machine: leave "
                f"--{option} out, or start as many as it says"
            )
    return local, started // local


@contextmanager
def several_devices(accelerator: str, devices: int, nodes: int, precision: Precision) -> "Iterator[Fabric | None]":
    """The processes of one run, where it is to have more than one; their process group ends with the context.

    Raises:
        DeviceError: this machine does not have them.
    """
    if devices * nodes == 1:
        yield None
        return
    import torch.distributed

    fabric = _fabric(accelerator, devices=devices, num_nodes=nodes, strategy="ddp", precision=precision)
    fabric.launch()
    try:
        yield fabric
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # left to the end of Python, its threads now and then abort it


def _fabric(accelerator: str, **settings: Any) -> "Fabric":
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        return Fabric(accelerator=accelerator, **settings)
    except (ImportError, MisconfigurationException, RuntimeError, ValueError) as error:
        raise DeviceError(f"--accelerator {accelerator}: {error}") from None

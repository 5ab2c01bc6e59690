"""Several runs at a time on this machine: one process a run, each with its own share of the cores or its own GPU.

Each place for a run is an executor of the standard library with one process. A process that dies breaks its own
executor only, so that it is known whose run it was; its run goes on in a new process, once.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess

from spectreg_lab.studies.worker import Job, Outcome, carry_out

ATTEMPTS = 2
POLL = 0.5  # seconds between two looks at what has happened


class Place:
    """Room for one run: a process that carries out one job after another, on a GPU of its own where it is given one."""

    def __init__(self, accelerator: str, threads: int, gpu: str | None) -> None:
        self.accelerator, self.threads, self.gpu = accelerator, threads, gpu
        self.process: BaseProcess | None = None
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, job: Job) -> "Future[Outcome]":
        """Begin ``job``, in a new process if there is none."""
        if self._executor is not None:
            return self._executor.submit(carry_out, job, self.accelerator, self.threads)
        spawn, before = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
        self._executor = ProcessPoolExecutor(1, spawn, _prepare, (self.threads, self.gpu))
        future = self._executor.submit(carry_out, job, self.accelerator, self.threads)
        (self.process,) = set(multiprocessing.active_children()) - before
        return future

    def bury(self) -> str:
        """What the dead process ended with; the next job gets a new one."""
        assert self._executor is not None
        self._executor.shutdown()
        code = None if self.process is None else self.process.exitcode
        self._executor = self.process = None
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"{name} (out of memory?)" if name == "SIGKILL" else name
        return f"exit code {code}"

    def close(self, at_once: bool) -> None:
        """Let the process go: when its job is done, or at once."""
        if at_once and self.process is not None:
            self.process.kill()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


class LocalEngine:
    """Runs side by side in processes of this machine."""

    def __init__(self, processes: int, threads: int, accelerator: str = "cpu", gpus: tuple[str, ...] = ()) -> None:
        self.places = [
            Place(accelerator, threads, gpus[number % len(gpus)] if gpus else None) for number in range(processes)
        ]

    @classmethod
    def for_machine(
        cls, processes: int | None, threads: int | None, accelerator: str = "auto", per_gpu: int | None = None
    ) -> "LocalEngine":
        """A process of one thread for each core, which keeps a CPU busy with small networks; else one for each GPU.

        Raises:
            DeviceError: there is no such accelerator here, or the numbers contradict each other.
        """
        import torch

        from spectreg_lab.training.devices import DeviceError, one_device

        if accelerator == "auto":
            accelerator = "cuda" if torch.cuda.is_available() else "cpu"
        one_device(accelerator)
        gpus = _gpus() if accelerator in ("cuda", "gpu") and torch.cuda.is_available() else ()
        if per_gpu and not gpus:
            raise DeviceError(f"--per-gpu {per_gpu}, but the accelerator here is {accelerator}: leave --per-gpu out")
        if per_gpu and processes:
            raise DeviceError("--processes and --per-gpu both say how many runs there are at a time: give one of them")
        threads, cores = threads or 1, os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        default = len(gpus) * (per_gpu or 1) if gpus else max(cores // threads, 1) if accelerator == "cpu" else 1
        return cls(processes or default, threads, accelerator, gpus)

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        for place in self.places:
            place.close(at_once=exception[0] is not None)

    def run(self, jobs: Iterator[Job]) -> Iterator[Outcome | None]:
        """Carry out ``jobs`` in order."""
        free, busy, retried = list(self.places), dict[Future[Outcome], tuple[Place, Job]](), list[Job]()
        while True:
            while free and (job := retried.pop() if retried else next(jobs, None)) is not None:
                place = free.pop(0)
                busy[place.submit(job)] = place, job
            if not busy:
                return
            ended = wait(busy, POLL, FIRST_COMPLETED).done
            for future in ended:
                place, job = busy.pop(future)
                free.append(place)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    outcome = _died(job, place.bury())
                    if outcome.status == "retried":
                        retried.append(outcome.job)
                    yield outcome
            if not ended:
                yield None


def _died(job: Job, cause: str) -> Outcome:
    if job.attempt < ATTEMPTS:
        return Outcome(job.again(), "retried", f"its process ended with {cause}")
    return Outcome(job.again(), "died", f"its process ended with {cause}, {job.attempt} times")


def _gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",")) if visible else tuple(map(str, range(torch.cuda.device_count())))


def _prepare(threads: int, gpu: str | None) -> None:
    """Set a new process up: its GPU, its threads, and an end of its own when nobody waits for it any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the process that asked for the runs
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)

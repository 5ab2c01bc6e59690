"""Runs as tasks of Ray Core: on the machines of a Ray cluster, or on this one where there is none.

A task is handed a job and returns its outcome; everything else goes through the study's folder, which all machines see.
A run whose process or machine dies goes on elsewhere, a run that failed by itself does not, and a machine under which
two processes have died gets no more. Ray's own retries are switched off, since they cannot tell these cases apart.
"""

import getpass
import logging
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spectreg_lab.storage.claims import holder
from spectreg_lab.studies.worker import Job, Outcome, carry_out
from spectreg_lab.training.devices import DeviceError

ATTEMPTS = 2  # processes that may die under a run; machines that die do not count
LOST = 2  # processes that may die on a machine
POLL = 0.5  # seconds between two looks at what has happened
STORE = 100 * 2**20  # bytes of Ray's object store on this machine, which holds nothing but outcomes


class RayEngine:
    """Runs as Ray tasks; a context manager that connects to the cluster, or starts one of this machine alone."""

    def __init__(
        self, address: str | None = None, cpus: int = 1, per_gpu: int | None = None, accelerator: str = "auto"
    ) -> None:
        alone = address is None and not os.environ.get("RAY_ADDRESS")
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # Ray's own pages on each death: ours is a line
        if alone:
            _keep_to_this_machine()
        try:
            import ray
        except ImportError:
            raise DeviceError("--engine ray needs Ray, which is not installed: pip install 'spectreg[ray]'") from None
        self.ray, self.cpus = ray, cpus
        self.lost: Counter[str] = Counter()
        try:
            self._connect(address, alone)
        except (OSError, RuntimeError, ValueError) as error:
            raise DeviceError(f"--engine ray: {str(error).splitlines()[0]}") from None
        there = ray.cluster_resources()
        self.accelerator = accelerator if accelerator != "auto" else "cuda" if there.get("GPU") else "cpu"
        self._share: dict[str, float] = {"num_cpus": cpus}
        if self.accelerator == "cuda":
            self._share["num_gpus"] = 1 / (per_gpu or 1)
        elif per_gpu:
            raise DeviceError(f"--per-gpu {per_gpu}, but the accelerator is {self.accelerator}: leave it out")
        if not self._room():
            raise DeviceError(f"--engine ray: the cluster has no machine with what a run takes ({self._share})")

    def _connect(self, address: str | None, alone: bool) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not alone:
            try:
                self.ray.init(address, **quiet)
                return
            except ConnectionError:
                if address != "auto":
                    raise
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        mine = str(Path(tempfile.gettempdir()) / f"ray-{getpass.getuser()}")
        self.ray.init(
            "local", num_cpus=cores, include_dashboard=False, object_store_memory=STORE, _temp_dir=mine, **quiet
        )

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.ray.shutdown()  # ends this study's tasks, and the cluster if it was started here

    def run(self, jobs: Iterator[Job]) -> Iterator[Outcome | None]:
        """Carry out ``jobs``, about in order."""
        busy, retried = dict[Any, Job](), list[Job]()
        while True:
            while len(busy) <= self._room() and (job := retried.pop() if retried else next(jobs, None)) is not None:
                busy[self._submit(job)] = job
            if not busy:
                return
            ended, _ = self.ray.wait(list(busy), timeout=POLL)
            for task in ended:
                outcome = self._outcome(task, busy.pop(task))
                if outcome.status == "retried":
                    retried.append(outcome.job)
                yield outcome
            if not ended:
                yield None

    def _submit(self, job: Job) -> Any:
        shunned = {node for node, times in self.lost.items() if times >= LOST} | set(job.shunned)
        shunned &= self._alive()
        if shunned == self._alive():
            shunned = {node for node in shunned if self.lost[node] >= LOST}
        if shunned == self._alive():
            raise DeviceError(
                f"on each machine of the cluster {LOST} processes have died: see Ray's logs for the cause"
            )
        where = {"ray.io/node-id": f"!in({','.join(sorted(shunned))})"} if shunned else {}
        task = self.ray.remote(_carry_out).options(max_retries=0, label_selector=where, **self._share)
        return task.remote(job, self.accelerator, self.cpus)

    def _outcome(self, task: Any, job: Job) -> Outcome:
        errors = self.ray.exceptions
        try:
            outcome = self.ray.get(task)
            assert isinstance(outcome, Outcome)
            return outcome
        except errors.RayTaskError as error:
            raise DeviceError(f"a machine of the cluster cannot do a run: {str(error).splitlines()[-1]}") from None
        except errors.RayError as error:
            return self._died(job, str(error).splitlines()[0], isinstance(error, errors.NodeDiedError))

    def _died(self, job: Job, cause: str, gone: bool) -> Outcome:
        owner = holder(job.folder)
        node = owner.node if owner is not None and owner.token == job.token else None
        where = owner.host if owner is not None and node else "a machine"
        if gone or (node is not None and node not in self._alive()):
            return Outcome(job.again(node, counts=False), "retried", f"{where} of the cluster is gone")
        if node is not None:
            self.lost[node] += 1
        if job.attempt < ATTEMPTS:
            return Outcome(job.again(node), "retried", f"its process on {where} died ({cause})")
        return Outcome(job.again(node), "died", f"its process died, {job.attempt} times ({cause})")

    def _alive(self) -> set[str]:
        return {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}

    def _room(self) -> int:
        """How many runs the cluster can do at a time; one more is kept waiting, so that no place is idle."""
        there, names = self.ray.cluster_resources(), {"num_cpus": "CPU", "num_gpus": "GPU"}
        return int(min(there.get(names[kind], 0) / share for kind, share in self._share.items()))


def _carry_out(job: Job, accelerator: str, threads: int) -> Outcome:
    import ray

    return carry_out(job, accelerator, threads, ray.get_runtime_context().get_node_id())


def _keep_to_this_machine() -> None:
    """Have a cluster of Ray's own making listen to this machine only, ask for a password, and report to nobody."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's name for: no addresses but the loopback's
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())

"""On which devices a run is done: one, unless several are asked for by their own options."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException

from spectreg_lab.settings.config import Precision

T = TypeVar("T")


class DeviceError(Exception):
    """Devices that cannot be had; the message says which can."""


def shape(devices: int | None, nodes: int | None) -> tuple[int, int]:
    """Devices of a machine and machines, of one run: one of each unless others are asked for.

    What is asked for must be what torchrun or Slurm has started, where either has. Processes that were started without
    asking for several devices are workers of a study, each with runs of its own.

    Raises:
        DeviceError: something else is asked for than has been started.
    """
    asked = (devices or 1) * (nodes or 1)
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    if asked == 1 or started == 1:
        return devices or 1, nodes or 1
    machines = nodes or int(os.environ.get("SLURM_NNODES") or 1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or max(started // machines, 1))
    for option, wanted, there in (("devices", devices, local), ("nodes", nodes, started // local)):
        if wanted not in (None, there):
            raise DeviceError(
                f"--{option} {wanted}, but {started} processes have been started, {local} on a machine: say "
                f"--devices {local} --nodes {started // local}, or start as many as --devices and --nodes say"
            )
    return local, started // local


def one_device(accelerator: str = "cpu", precision: Precision = "32-true") -> Fabric:
    """The first device of an accelerator, whatever processes torchrun or Slurm have started beside this one.

    Raises:
        DeviceError: this machine has none.
    """
    alone = LightningEnvironment()  # else Fabric takes the tasks of Slurm for this run.s and may refuse them
    return _fabric(accelerator, devices=1, precision=precision, plugins=[alone])


@contextmanager
def several_devices(accelerator: str, devices: int, nodes: int, precision: Precision) -> Iterator[Fabric | None]:
    """The processes of one run, where it is to have more than one; their process group ends with the context.

    Raises:
        DeviceError: this machine does not have them.
    """
    if devices * nodes == 1:
        yield None
        return
    _check_cores(accelerator, devices)
    fabric = _fabric(accelerator, devices=devices, num_nodes=nodes, strategy="ddp", precision=precision)
    fabric.launch()
    try:
        yield fabric
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # left to the end of Python, its threads now and then abort it


def _check_cores(accelerator: str, devices: int) -> None:
    """Refuse to start more processes on a CPU than it has cores; other accelerators count their devices themselves."""
    started = "WORLD_SIZE" in os.environ or "SLURM_NTASKS" in os.environ
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    cores = os.cpu_count() or 1
    if on_cpu and not started and devices > cores:
        raise DeviceError(f"--devices {devices}, but this machine has a CPU of {cores} cores: use at most that many")


def first_decides(fabric: Fabric, decide: Callable[[], T]) -> T:
    """What ``decide`` returns or raises on the first process of a run, on all of them."""
    decided: tuple[T | None, Exception | None] = (None, None)
    if fabric.global_rank == 0:
        try:
            decided = decide(), None
        except Exception as error:
            if fabric.world_size == 1:
                raise
            decided = None, error
    result, failure = fabric.broadcast(decided)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _fabric(accelerator: str, **settings: Any) -> Fabric:
    try:
        return Fabric(accelerator=accelerator, **settings)
    except (ImportError, MisconfigurationException, RuntimeError, ValueError) as error:
        raise DeviceError(f"--accelerator {accelerator}: {error}") from None

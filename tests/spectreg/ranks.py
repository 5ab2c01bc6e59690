"""Run a function on several processes that talk through gloo."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What takes long to import is imported once, by the server from which all processes are forked.
PRELOADED = (
    "pytest", "hypothesis", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel", "spectreg.power_iteration.sharded",
)  # fmt: skip


def on_ranks(count: int, function: Callable[..., None], *arguments: object) -> None:
    """Call ``function(*arguments)`` on each of ``count`` ranks; an error on any of them is raised here."""
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as folder:
        start = (count, os.path.join(folder, "store"), function, arguments)
        mp.start_processes(_start, start, nprocs=count, start_method="forkserver")


def _start(rank: int, count: int, store: str, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()

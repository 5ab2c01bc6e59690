"""Run a function on several processes that talk through gloo."""

import os
import tempfile
from collections.abc import Callable

import forked
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(count: int, function: Callable[..., None], *arguments: object) -> None:
    """Call ``function(*arguments)`` on each of ``count`` ranks; an error on any of them is raised here."""
    forked.context()
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

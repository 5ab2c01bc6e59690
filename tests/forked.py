"""Processes forked from a server that has imported what takes seconds to import, once for all of them."""

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

PRELOADED = [
    "pytest", "hypothesis", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel", "spectreg.power_iteration.sharded", "spectreg_lab.training.runs",
]  # fmt: skip


def context() -> Any:
    """What starts such processes."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return multiprocessing.get_context("forkserver")


def process(function: Callable[..., object], *arguments: object) -> Any:
    """One that calls ``function``, with the environment of now: the server has that of when it was started."""
    one = context().Process(target=_call, args=(dict(os.environ), function, *arguments))
    one.start()
    return one


def _call(environment: Mapping[str, str], function: Callable[..., object], *arguments: object) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def _prepare(environment: Mapping[str, str], threads: int, gpu: str | None) -> None:
    from spectreg_lab.studies import local

    os.environ.update(environment)
    local._prepare(threads, gpu)


@contextmanager
def local_engine() -> Iterator[None]:
    """The lab's processes on this machine are started so meanwhile."""
    from spectreg_lab.studies import local

    ready = context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "_prepare", functools.partial(_prepare, dict(os.environ)))
        patch.setattr(multiprocessing, "get_context", lambda method=None: ready)
        yield

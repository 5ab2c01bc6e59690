"""Every test runs with the shapes of the library's annotations checked, on one thread unless OMP_NUM_THREADS is set."""

import os
import sys
from collections import Counter
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a hub name fails at once

import annotations
import jaxtyping

with annotations.once(), jaxtyping.install_import_hook("spectreg", "beartype.beartype"):
    import spectreg  # noqa: F401

import pytest
import torch

MEASURED = 2  # of a test's parameters, the first ones; tracing every line doubles what the others take
seen: Counter[str] = Counter()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Coverage is told of the first parameters of a test only, and of none of one marked ``untraced``."""
    test = item.nodeid.partition("[")[0]
    seen[test] += 1
    coverage = sys.modules.get("coverage")
    left_out = seen[test] > MEASURED or item.get_closest_marker("untraced") is not None
    measuring = coverage.Coverage.current() if coverage and left_out else None
    if measuring is None:
        return (yield)
    measuring.stop()
    try:
        return (yield)
    finally:
        measuring.start()

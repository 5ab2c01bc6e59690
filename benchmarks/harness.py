"""Times taken in turn, their paired ratios, and a JSON line for every row."""

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectreg_lab.storage.provenance import describe

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
RESULTS = Path(__file__).parents[1] / "results" / "benchmarks.jsonl"
ROUNDS = 15
PEERS = ("curvlinops-for-pytorch", "deel-torchlip", "orthogonium", "pyhessian", "pytorch-lightning", "scipy",
         "weightwatcher")  # fmt: skip
END = float(
    os.environ.get("SPECTREG_BENCHMARKS_END", "0")
)  # when all benchmarks should be done, in seconds of the epoch
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the record: ``value`` is the median, ``low`` and ``high`` the quartiles.

    A value in ``×`` is ours over the other's, so that above 1 the other is ahead, unless ``at_least`` says that more is
    better. ``at_most`` and ``at_least`` are the limit of ``goal``, which several rows may share. ``error`` is how far
    the two sides' results lie apart, or one side from the truth, as ``note`` says. ``why`` is shown where the goal is
    missed or the other is ahead. A row without a value is of something that did not run.
    """

    benchmark: str
    case: str
    subject: str
    against: str
    unit: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 1
    seconds: float | None = None
    other_seconds: float | None = None
    goal: str = ""
    at_most: float | None = None
    at_least: float | None = None
    error: float | None = None
    note: str = ""
    why: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None where there is none."""
        if self.at_most is None and self.at_least is None:
            return None
        if self.value is None:
            return False
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    @property
    def behind(self) -> bool:
        """Whether the other side is ahead."""
        if self.unit != "×" or self.value is None:
            return False
        return self.value < 1 if self.at_least is not None else self.value > 1


def in_turn(
    calls: Mapping[str, Call],
    rounds: int = ROUNDS,
    warmup: int = 2,
    between: Call | None = None,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of every call in every round, A B A B …, after ``warmup`` rounds that are not counted.

    Of the processor by default: what other processes do counts only as far as they crowd caches and memory.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for number in range(-warmup, rounds):
        for name, call in calls.items():
            if between is not None:
                between()
            start = clock()
            call()
            taken = clock() - start
            if number >= 0:
                times[name].append(taken)
        expected = rounds * (time.perf_counter() - begin) / (warmup + 1)
        if number == 0 and expected > 5 and multiprocessing.parent_process() is None:
            print(f"  … {rounds} rounds of {', '.join(calls)}: {expected:.0f} s", flush=True)
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(benchmark: str, case: str, subject: str, against: str, times: Mapping[str, list[float]], **more: Any) -> Row:
    """The paired ratios of ``subject`` to ``against``."""
    low, middle, high = quartiles([a / b for a, b in zip(times[subject], times[against], strict=True)])
    taken, other = (statistics.median(times[name]) for name in (subject, against))
    return Row(
        benchmark, case, subject, against, "×", middle, low, high, len(times[subject]), taken, other, **more
    )  # fmt: skip


def spread(benchmark: str, case: str, subject: str, against: str, unit: str, values: Sequence[float],
           **more: Any) -> Row:  # fmt: skip
    """The median of ``values`` and their quartiles."""
    low, middle, high = quartiles(values)
    return Row(benchmark, case, subject, against, unit, middle, low, high, len(values), **more)


def record(row: Row, path: Path = RESULTS) -> None:
    """Print the row and append it, with where it comes from."""
    line = asdict(row) | {"met": row.met, "behind": row.behind, "load": os.getloadavg()[0]} | origin()
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as lines:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    value = "did not run" if row.value is None else f"{row.value:.4g} {row.unit}"
    if row.low is not None:
        value += f" [{row.low:.4g}, {row.high:.4g}]"
    taken = f" ({row.seconds * 1e3:.2f} ms)" if row.seconds is not None else ""
    goal = {None: "", True: "  goal met", False: "  GOAL MISSED"}[row.met]
    left = f"{max(END - time.time(), 0) / 60:4.1f} min left | " if END else ""
    print(f"{left}{row.case} | {row.subject} / {row.against}: {value}{taken}{goal} {row.note}", flush=True)


@cache
def origin() -> dict[str, Any]:
    """Versions, machine, threads, commit and time of this process."""
    return describe("cpu", torch.get_num_threads()) | {"peers": {name: installed(name) for name in PEERS}}


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def same(what: str, found: Tensor, truth: Tensor, tolerance: float) -> float:
    """The relative distance of two results that a benchmark compares; an error if it is above ``tolerance``."""
    apart = float((found - truth).norm() / truth.norm())
    if not apart <= tolerance:
        raise AssertionError(f"{what}: the two sides differ by {apart:.1e} relative, above {tolerance:.0e}.")
    return apart


def failed(benchmark: str, case: str, subject: str, against: str, error: BaseException, **more: Any) -> Row:
    """The row of something that did not run, with the reason."""
    said = str(error).strip().splitlines()
    note = f"{type(error).__name__}: {said[0] if said else ''}"[:200]
    return Row(benchmark, case, subject, against, "×", note=note, **more)


_buffer: list[Tensor] = []


def sweep() -> None:
    """Put everything out of the caches, as the passes of a network leave them."""
    if not _buffer:
        _buffer.append(torch.zeros(2**24))
    _buffer[0].add_(1.0)

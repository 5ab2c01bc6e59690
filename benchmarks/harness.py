"""Times taken in turn, their paired ratios, and a JSON line for every row."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectreg_lab.provenance import describe

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
RESULTS = Path(__file__).parents[1] / "results" / "benchmarks.jsonl"
ROUNDS = 15
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the record: ``value`` is the median, ``low`` and ``high`` the quartiles.

    ``at_most`` and ``at_least`` are the goal, if there is one; ``error`` is how far the two sides' results lie apart,
    or one side from the truth, as ``note`` says. A row without a value is of something that did not run.
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
    at_most: float | None = None
    at_least: float | None = None
    error: float | None = None
    note: str = ""

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


def seconds(call: Call, clock: Callable[[], float] = time.process_time) -> float:
    """Of the processor by default: what other processes do counts only as far as they crowd caches and memory."""
    begin = clock()
    call()
    return clock() - begin


def in_turn(
    calls: Mapping[str, Call],
    rounds: int = ROUNDS,
    warmup: int = 2,
    between: Call | None = None,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of every call in every round, A B A B …, after ``warmup`` rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-warmup, rounds):
        for name, call in calls.items():
            if between is not None:
                between()
            taken = seconds(call, clock)
            if number >= 0:
                times[name].append(taken)
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


def record(row: Row, path: Path = RESULTS) -> None:
    """Print the row and append it, with where it comes from."""
    line = asdict(row) | {"met": row.met, "load": os.getloadavg()[0]} | origin()
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as lines:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    value = (
        "did not run"
        if row.value is None
        else f"{row.value:.4g} [{row.low or row.value:.4g}, {row.high or row.value:.4g}]"
    )
    taken = f" ({row.seconds * 1e3:.2f} ms)" if row.seconds is not None else ""
    goal = {None: "", True: "  goal met", False: "  GOAL MISSED"}[row.met]
    print(
        f"{row.benchmark} | {row.case} | {row.subject} / {row.against}: {value} {row.unit}{taken}{goal} {row.note}",
        flush=True,
    )


@cache
def origin() -> dict[str, str]:
    """Versions, machine, threads, commit and time of this process."""
    return describe("cpu", torch.get_num_threads())


def same(what: str, found: Tensor, truth: Tensor, tolerance: float) -> float:
    """The relative distance of two results that a benchmark compares; an error if it is above ``tolerance``."""
    apart = float((found - truth).norm() / truth.norm())
    if not apart <= tolerance:
        raise AssertionError(f"{what}: the two sides differ by {apart:.1e} relative, above {tolerance:.0e}.")
    return apart


def failed(benchmark: str, case: str, subject: str, against: str, error: BaseException) -> Row:
    """The row of something that did not run, with the reason."""
    said = str(error).strip().splitlines()
    return Row(benchmark, case, subject, against, "×", note=f"{type(error).__name__}: {said[0] if said else ''}"[:200])


_buffer: list[Tensor] = []


def sweep() -> None:
    """Put everything out of the caches, as the passes of a network leave them."""
    if not _buffer:
        _buffer.append(torch.zeros(2**24))
    _buffer[0].add_(1.0)

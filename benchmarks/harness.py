"""Times taken in turn, their paired ratios, and a JSON line for every row."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectreg_lab.storage.provenance import describe

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
RESULTS = Path(__file__).parents[1] / "results" / "benchmarks.jsonl"
ROUNDS = 15
PEERS = ("curvlinops-for-pytorch", "deel-torchlip", "orthogonium", "pyhessian", "pytorch-lightning", "scipy",
         "weightwatcher")  # fmt: skip
Call = Callable[[], object]
Times = dict[str, list[float]]
Ratio = tuple[str, str, dict[str, Any]]  # a row: what, beside what, and its limit or remarks, as `Row` has them


@dataclass(frozen=True)
class Row:
    """One line of the record: ``value`` is the median, ``low`` and ``high`` the quartiles.

    A value in ``×`` is ours over the other's, so that above 1 the other is ahead, unless ``at_least`` says that more is
    better. ``error`` is how far the two sides' results lie apart, or one side from the truth, as ``note`` says. ``why``
    is shown where the limit is missed or the other is ahead. A row without a value is of something that did not run.
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
    why: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value is within its limit; None where there is none."""
        if self.at_most is None and self.at_least is None:
            return None
        if self.value is None:
            return False
        return self.value <= self.at_most if self.at_least is None else self.value >= self.at_least

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
) -> Times:
    """Seconds of every call in every round, A B A B …, after ``warmup`` rounds that are not counted.

    Of the processor by default: what other processes do counts only as far as they crowd caches and memory.
    """
    times: Times = {name: [] for name in calls}
    for number in range(-warmup, rounds):
        for name, call in calls.items():
            if between is not None:
                between()
            start = clock()
            call()
            taken = clock() - start
            if number >= 0:
                times[name].append(taken)
    return times


def lazily(make: Callable[[], Call]) -> Call:
    """A call that is made when it is first used: where its package is missing, it fails then."""
    made = cache(make)
    return lambda: made()()


def first(benchmark: str, case: str, calls: Mapping[str, Call]) -> dict[str, Any]:
    """What each call returns at first; for one that does not run a row says why not."""
    results = {}
    for name, call in calls.items():
        try:
            results[name] = call()
        except Exception as error:
            record(failed(benchmark, case, name, error))
    return results


def timed(benchmark: str, case: str, calls: Mapping[str, Call], rounds: int = ROUNDS, **how: Any) -> Times:
    """Seconds, in turn, of the calls that run at all."""
    return in_turn({name: calls[name] for name in first(benchmark, case, calls)}, rounds, **how)


def compare(benchmark: str, case: str, calls: Mapping[str, Call], rows: Iterable[Ratio], **how: Any) -> None:
    """Time the calls in turn and record the rows."""
    ratios(benchmark, case, timed(benchmark, case, calls, **how), rows)


def ratios(benchmark: str, case: str, times: Times, rows: Iterable[Ratio]) -> None:
    """Record each row whose two sides both ran."""
    for subject, against, more in rows:
        if subject in times and against in times:
            record(ratio(benchmark, case, subject, against, times, **more))


def differences(times: Times, base: str = "vanilla") -> Times:
    """What each call takes longer than ``base``, in every round."""
    return {n: [a - b for a, b in zip(t, times[base], strict=True)] for n, t in times.items() if n != base}


def quartiles(values: Sequence[float]) -> tuple[float, ...]:
    """Lower quartile, median, upper quartile."""
    return tuple(np.quantile(values, (0.25, 0.5, 0.75)).tolist())


def ratio(benchmark: str, case: str, subject: str, against: str, times: Times, **more: Any) -> Row:
    """The paired ratios of ``subject`` to ``against``."""
    taken, other = times[subject], times[against]
    more |= {"seconds": statistics.median(taken), "other_seconds": statistics.median(other)}
    return spread(benchmark, case, subject, against, "×", [a / b for a, b in zip(taken, other, strict=True)], **more)


def spread(
    benchmark: str, case: str, subject: str, against: str, unit: str, values: Sequence[float], **more: Any
) -> Row:
    """The median of ``values`` and their quartiles."""
    low, middle, high = quartiles(values)
    return Row(benchmark, case, subject, against, unit, middle, low, high, len(values), **more)


def failed(benchmark: str, case: str, subject: str, error: BaseException) -> Row:
    """The row of something that did not run, with the reason."""
    return Row(benchmark, case, subject, "", "×", note=f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")


def record(row: Row, path: Path | None = None) -> None:
    """Print the row and append it, with where it comes from."""
    line = asdict(row) | {"met": row.met, "behind": row.behind, "load": os.getloadavg()[0]} | origin()
    with (path or RESULTS).open("a") as lines:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    value = "did not run" if row.value is None else f"{row.value:.4g} {row.unit}"
    taken = f" ({row.seconds * 1e3:.2f} ms / {row.other_seconds * 1e3:.2f} ms)" if row.seconds is not None else ""
    limit = {None: "", True: "  limit met", False: "  LIMIT MISSED"}[row.met]
    print(f"{row.case} | {row.subject} / {row.against}: {value}{taken}{limit} {row.note}", flush=True)


@cache
def origin() -> dict[str, Any]:
    """Versions, machine, threads, commit and time of this process."""
    versions = {package.name: package.version for package in distributions()}
    peers = {name: versions.get(name, "not installed") for name in PEERS}
    return describe("cpu", torch.get_num_threads()) | {"peers": peers}


def same(what: str, found: Tensor, truth: Tensor, tolerance: float) -> float:
    """The relative distance of two results that a benchmark compares; an error if it is above ``tolerance``."""
    apart = float((found - truth).norm() / truth.norm())
    if not apart <= tolerance:
        raise AssertionError(f"{what}: the two sides differ by {apart:.1e} relative, above {tolerance:.0e}.")
    return apart

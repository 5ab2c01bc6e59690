"""The regularizer alone, without a network, from 1 M to 1 G parameters.

The floor of any gradient penalty is one read of each weight and one read-modify-write of its gradient. Memory is what
torch's allocator hands out at most while the regularizer is made and takes its first step, beyond weights and
gradients.
"""

import statistics
from collections.abc import Callable

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import penalties as by
from benchmarks.harness import ROUNDS, Call, Row, in_turn, ratio, record, spread, sweep
from spectreg import SpectralNormRegularizer

NAME = "regularizer alone"
SECONDS = 110
F32, BF16 = torch.float32, torch.bfloat16
# Kind, size, how many of its first weights are regularized, precision.
MODELS = (
    ("few large weights", 4096, (6, 18, 60), F32),
    ("few large weights", 1024, (1, 10), F32),
    ("many small weights", 160, (40, 400, 4000), F32),
    ("few large weights", 4096, (6,), BF16),
    ("many small weights", 160, (40, 400), BF16),
)
WHY_SMALL = (
    "Of a small weight what counts is the fixed cost of a torch call. A power step needs more calls than the floor; "
    "the row of bare torch calls says how much that is by itself."
)
WHY_BF16 = "Vectors and products are in float32: the weight is converted piece by piece, where the floor stays in bf16."
WHY_LARGE = "Each weight is read twice, the second time from cache at best; `steps=0.5` reads it once."


def linears(count: int, size: int, dtype: torch.dtype = F32) -> nn.Sequential:
    """Linear layers with weights and gradients that are there."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count)])
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.uniform_(p, -0.01, 0.01)
    return by.with_gradients(model)  # type: ignore[return-value]


def peak(call: Callable[[], object]) -> int:
    """Bytes that torch's allocator hands out beyond those there before, at the highest moment of ``call``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    now = most = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def fitting(counts: tuple[int, ...], size: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Those of ``counts`` whose weights and gradients fit into the memory that is free; a row for those that do not."""
    there = psutil.virtual_memory().available
    needed = {count: 2.3 * count * size**2 * dtype.itemsize for count in counts}
    for count in (c for c in counts if needed[c] > there):
        note = f"skipped: {needed[count] / 2**30:.1f} GiB of free memory needed, {there / 2**30:.1f} there"
        record(Row(NAME, case_of(count, size, dtype), "add_gradient", "floor", "×", note=note))
    return tuple(count for count in counts if needed[count] <= there)


def case_of(count: int, size: int, dtype: torch.dtype) -> str:
    millions = count * size**2 / 1e6
    return f"{millions:.0f} M {'of bf16 ' if dtype == BF16 else ''}in {count} × {size}²"


def measure(kind: str, size: int, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """All rows of a model of ``counts[-1]`` weights and of its first few."""
    counts = fitting(counts, size, dtype)
    model = linears(max(counts, default=0), size, dtype)
    taken: dict[int, list[float]] = {}
    for count in counts:
        case, part = case_of(count, size, dtype), model[:count]
        weights = by.matrices(part)
        made: list[SpectralNormRegularizer] = []
        extra = peak(lambda p=part, m=made: m.append(by.ready(p, warmup=1)) or m[0].add_gradient())
        memory(case, kind, extra, weights)
        calls: dict[str, Call] = {
            "add_gradient": made[0].add_gradient,
            "half steps": by.ready(part, steps=0.5, warmup=1).add_gradient,
            "floor": by.floor(weights),
        }
        if dtype == F32 and size < 1000:
            calls["bare torch calls"] = by.bare(weights, [F.normalize(torch.randn(size), dim=0) for _ in weights])
        times = in_turn(calls, ROUNDS, 2)
        beside_floor(case, kind, times, dtype, count * size**2)
        if "bare torch calls" in calls:
            limit = 1.0 if count * size**2 < 2e6 else None
            beside_calls(case, times, limit)
            if limit:
                beside_calls(f"{case}, caches swept", in_turn(calls, ROUNDS, 2, sweep), None)
        taken[count] = times["add_gradient"]
    growth(f"{kind} of {size}²{', bf16' if dtype == BF16 else ''}", taken, size)


def beside_floor(case: str, kind: str, times: dict[str, list[float]], dtype: torch.dtype, total: int) -> None:
    why = WHY_BF16 if dtype == BF16 else WHY_SMALL if kind.startswith("many") else WHY_LARGE
    stated = kind.startswith("few") and total >= 9e7 and dtype == F32
    for name, limit in (("add_gradient", 1.4), ("half steps", 1.08)):
        goal = f"alone, 100 M to 1 G parameters: {'half steps ' * (name != 'add_gradient')}at most {limit} × the floor"
        more = {"at_most": limit, "goal": goal} if stated else {}
        record(ratio(NAME, case, name, "floor", times, why=why, **more))


def beside_calls(case: str, times: dict[str, list[float]], limit: float | None) -> None:
    """What ours takes longer than a power step in torch calls, and what those take by themselves."""
    ours, calls, floor = (times[name] for name in ("add_gradient", "bare torch calls", "floor"))
    more = [1e3 * (a - b) for a, b in zip(ours, calls, strict=True)]
    goal = "alone, 1 M parameters in 40 weights: at most 1 ms more than bare torch calls" if limit else ""
    record(spread(NAME, case, "add_gradient", "bare torch calls", "ms more", more, at_most=limit, goal=goal))
    ratios, note = [a / b for a, b in zip(calls, floor, strict=True)], "a power step without any check"
    record(spread(NAME, case, "bare torch calls", "floor", "× the floor", ratios, note=note))


def growth(case: str, taken: dict[int, list[float]], size: int) -> None:
    """Time a parameter, of each size over that of the smallest from 100 M on, or of the smallest."""
    large = {count: times for count, times in taken.items() if count * size**2 > 9e7}
    stated = len(large) > 1
    if not taken:
        return
    (base, first), *others = (large if stated else taken).items()
    for count, times in others:
        values = [a / count / (b / base) for a, b in zip(times, first, strict=True)]
        goal = "alone, 100 M to 1 G parameters: time grows linearly (at most 1.1 × a parameter)"
        more = {"at_most": 1.1, "goal": goal} if stated else {}
        names = [f"{c * size**2 / 1e6:.0f} M" for c in (count, base)]
        note = f"{statistics.median(times) / count / size**2 * 1e9:.3f} ms a million parameters"
        record(spread(NAME, case, *names, "× time a parameter", values, note=note, **more))


def memory(case: str, kind: str, extra: int, weights: list[Tensor]) -> None:
    held = sum(W.nbytes for W in weights)
    vectors = sum(4 * (len(W) + W[0].numel()) for W in weights)
    stated = sum(W.numel() for W in weights) > 9e7
    kind += " in bf16" if weights[0].dtype == BF16 else ""
    goal = f"alone, 100 M to 1 G parameters, {kind}: peak memory at most 1 % of the weights"
    more = {"at_most": 1.0, "goal": goal} if stated else {}
    why = f"By arithmetic the two vectors of each of these weights are {100 * vectors / held:.2g} % of it; what a step "
    why += "needs to work on them comes on top."
    if weights[0].dtype == BF16:
        why = "The piece of a weight that is converted to float32 counts, and a bf16 weight is half as large."
    note = f"{extra / 2**20:.1f} MiB"
    record(
        Row(NAME, case, "peak memory", "weights", "% of the weights", 100 * extra / held, note=note, why=why, **more)
    )


def main() -> None:
    by.check()
    by.ready(linears(2, 64)).add_gradient()  # what torch loads at its first call is no memory of the regularizer
    for kind, size, counts, dtype in MODELS:
        measure(kind, size, counts, dtype)
    model = linears(6, 4096)
    extra = peak(by.by_autograd(by.matrices(model), [torch.randn(4096) for _ in range(6)]))
    share = 100 * extra / sum(W.nbytes for W in by.matrices(model))
    record(
        Row(NAME, case_of(6, 4096, F32), "peak memory of the autograd penalty", "weights", "% of the weights", share)
    )

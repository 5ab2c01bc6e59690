"""The regularizer alone, from 1 M to 1 G parameters in large and in small weights, beside the hardware's floor."""

import statistics
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn

from benchmarks import penalties as by
from benchmarks.harness import ROUNDS, Row, in_turn, ratio, record
from spectreg import SpectralNormRegularizer

NAME = "regularizer alone"
LARGE = {1e6: (1, 1024), 1e7: (10, 1024), 1e8: (6, 4096), 1e9: (60, 4096)}
SMALL = {1e6: (40, 160), 1e7: (400, 160), 1e8: (4000, 160)}


def linears(count: int, size: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers with weights and gradients that are there."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count)])
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.uniform_(p, -0.01, 0.01)
    return by.with_gradients(model)  # type: ignore[return-value]


def peak(call: Callable[[], object]) -> int | None:
    """Bytes of memory that ``call`` adds at its peak; None where the system does not say (it is Linux that does)."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    clear.write_text("5")
    before = psutil.Process().memory_info().rss
    call()
    highest = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return int(highest) * 1024 - before


def measure(case: str, model: nn.Sequential, large: bool) -> None:
    weights = by.matrices(model)
    made: list[SpectralNormRegularizer] = []
    extra = peak(lambda: made.append(by.ready(model, warmup=1)) or made[0].add_gradient())
    half = by.ready(model, steps=0.5, warmup=1)
    calls = {"add_gradient": made[0].add_gradient, "half steps": half.add_gradient, "floor": by.floor(weights)}
    times = in_turn(calls, ROUNDS, 2)
    size = sum(W.numel() for W in weights)
    goal = large and size > 5e7 and weights[0].dtype == torch.float32
    for name, limit in (("add_gradient", 1.4), ("half steps", 1.08)):
        record(ratio(NAME, case, name, "floor", times, at_most=limit if goal else None))
    taken = statistics.median(times["add_gradient"])
    record(Row(NAME, case, "add_gradient", "parameters", "ms per million", taken / size * 1e9, seconds=taken))
    if extra is not None:
        share = extra / sum(W.nbytes for W in weights)
        note = f"{extra / 2**20:.1f} MiB, at the first call"
        record(Row(NAME, case, "peak memory", "weights", "share", share, at_most=0.01 if goal else None, note=note))


def main() -> None:
    by.ready(linears(2, 64)).add_gradient()  # what torch loads at its first call is no memory of the regularizer
    for kind, sizes in (("small", SMALL), ("large", LARGE)):
        for total, (count, size) in sizes.items():
            case = f"{total / 1e6:.0f} M in {count} × {size}²"
            need = 8 * count * size**2 * 1.15
            if psutil.virtual_memory().available < need:
                there = psutil.virtual_memory().available
                note = f"skipped: {need / 2**30:.1f} GiB of free memory needed, {there / 2**30:.1f} there"
                record(Row(NAME, case, "add_gradient", "floor", "×", note=note))
                continue
            measure(case, linears(count, size), kind == "large")
    measure("101 M of bf16 in 6 × 4096²", linears(6, 4096, torch.bfloat16), True)

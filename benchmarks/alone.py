"""The memory of the regularizer alone, without a network, from 1 M to 1 G parameters; its time is in `core`.

Memory is what torch's allocator hands out at most while the regularizer is made and takes its first step, beyond
weights and gradients.
"""

from collections.abc import Callable

import psutil
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import penalties as by
from benchmarks.harness import Row, record
from spectreg import SpectralNormRegularizer

NAME = "regularizer alone"
SECONDS = 60
F32, BF16 = torch.float32, torch.bfloat16
# How many weights, their size and precision.
MODELS = ((6, 4096, F32), (60, 4096, F32), (10, 1024, F32), (40, 160, F32), (6, 4096, BF16))


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


def case_of(count: int, size: int, dtype: torch.dtype) -> str:
    millions = count * size**2 / 1e6
    return f"{millions:.0f} M {'of bf16 ' if dtype == BF16 else ''}in {count} × {size}²"


def measure(count: int, size: int, dtype: torch.dtype) -> None:
    there, needed = psutil.virtual_memory().available, 2.3 * count * size**2 * dtype.itemsize
    if needed > there:
        note = f"skipped: {needed / 2**30:.1f} GiB of free memory needed, {there / 2**30:.1f} there"
        record(Row(NAME, case_of(count, size, dtype), "peak memory", "weights", "% of the weights", note=note))
        return
    model = linears(count, size, dtype)
    made: list[SpectralNormRegularizer] = []
    extra = peak(lambda: made.append(by.ready(model, warmup=1)) or made[0].add_gradient())
    memory(case_of(count, size, dtype), extra, by.matrices(model))


def memory(case: str, extra: int, weights: list[Tensor]) -> None:
    held = sum(W.nbytes for W in weights)
    vectors = sum(4 * (len(W) + W[0].numel()) for W in weights)
    kind = "in bf16" if weights[0].dtype == BF16 else "in float32"
    goal = f"alone, 100 M to 1 G parameters {kind}: peak memory at most 1 % of the weights"
    more = {"at_most": 1.0, "goal": goal} if sum(W.numel() for W in weights) > 9e7 else {}
    why = f"By arithmetic the two vectors of each of these weights are {100 * vectors / held:.2g} % of it; what a step "
    why += "needs to work on them comes on top."
    if weights[0].dtype == BF16:
        why = "The piece of a weight that is converted to float32 counts, and a bf16 weight is half as large."
    note, share = f"{extra / 2**20:.1f} MiB", 100 * extra / held
    record(Row(NAME, case, "peak memory", "weights", "% of the weights", share, note=note, why=why, **more))


def main() -> None:
    by.check()
    by.ready(linears(2, 64)).add_gradient()  # what torch loads at its first call is no memory of the regularizer
    for model in MODELS:
        measure(*model)
    large = linears(6, 4096)
    extra = peak(by.by_autograd(by.matrices(large), [torch.randn(4096) for _ in range(6)]))
    share = 100 * extra / sum(W.nbytes for W in by.matrices(large))
    case = case_of(6, 4096, F32)
    record(Row(NAME, case, "peak memory of the autograd penalty", "weights", "% of the weights", share))

"""The memory of the regularizer alone, without a network, from 1 M to 1 G parameters; its time is in `core`.

Memory is what torch's allocator hands out at most while the regularizer is made and takes its first step, beyond
weights and gradients.
"""

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import penalties as by
from benchmarks.harness import Call, Row, record

NAME = "regularizer alone"
F32, BF16 = torch.float32, torch.bfloat16
WHY_BF16 = "The piece of a weight that is converted to float32 counts, and a bf16 weight is half as large."
# How many weights, their size and precision, and the most memory, in per cent of theirs.
MODELS = ((6, 4096, F32, 1.0), (60, 4096, F32, 1.0), (10, 1024, F32, None), (40, 160, F32, None), (6, 4096, BF16, 1.0))


def peak(call: Call) -> int:
    """Bytes that torch's allocator hands out beyond those there before, at the highest moment of ``call``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    now = most = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def main() -> None:
    by.ready(by.linears(2, 64)).add_gradient()  # what torch loads at its first call is no memory of the regularizer
    for count, size, dtype, limit in MODELS:
        model, made = by.linears(count, size, dtype), []
        held = sum(W.nbytes for W in by.matrices(model))
        case = f"{count * size**2 / 1e6:.0f} M {'of bf16 ' if dtype == BF16 else ''}in {count} × {size}²"

        def ours(model=model, made=made) -> None:  # type: ignore[no-untyped-def]
            made.append(by.ready(model, warmup=1))
            made[0].add_gradient()

        peaks = {"peak memory": (peak(ours), limit)}
        if dtype == F32 and count == 6:
            peaks["peak memory of the autograd penalty"] = peak(by.ways(model)["autograd penalty"]), None
        for name, (extra, at_most) in peaks.items():
            why = WHY_BF16 if dtype == BF16 else ""
            share, note = 100 * extra / held, f"{extra / 2**20:.1f} MiB"
            record(Row(NAME, case, name, "weights", "% of the weights", share, at_most=at_most, note=note, why=why))

"""Many small weights: torch calls and host reads of a step, and the same under torch.compile."""

import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import penalties as by
from benchmarks.alone import linears
from benchmarks.harness import Call, Row, failed, in_turn, ratio, record

NAME = "many small weights"
CASE = "200 × 64²"
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")


class Counter(TorchDispatchMode):
    """Counts the operators that run, and those that read a value back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        self.reads += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))


def variants() -> dict[str, Call]:
    model = linears(200, 64)
    weights = by.matrices(model)
    vectors = [F.normalize(torch.randn(64), dim=0) for _ in weights]
    return {
        "add_gradient": by.ready(model).add_gradient,
        "penalty()": by.by_penalty(by.ready(model)),
        "torch calls by hand": by.bare(weights, vectors),
        "autograd penalty": by.by_autograd(weights, vectors),
        "torch's spectral_norm": by.parametrized_weights(by.normalized(linears(200, 64))),
    }


def compiled() -> None:
    """A compiled training step with the regularizer after it, and with the regularizer inside."""
    model = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(64, 64), nn.ReLU())])
    x, y = torch.randn(64, 64), torch.randint(10, (64,))
    regularizer = by.ready(model)
    loss = torch.compile(lambda: F.cross_entropy(model(x), y))

    def inside() -> None:
        model.zero_grad()
        loss().backward()
        regularizer.add_gradient()

    def vanilla() -> None:
        model.zero_grad()
        loss().backward()

    start = time.perf_counter()
    inside()
    note = f"first call {time.perf_counter() - start:.1f} s, compiling included; the regularizer itself is not compiled"
    times = in_turn({"compiled step + add_gradient": inside, "compiled step": vanilla}, 30)
    record(ratio(NAME, "10 × 64², torch.compile", "compiled step + add_gradient", "compiled step", times, note=note))
    alone = torch.compile(regularizer.add_gradient)
    start = time.perf_counter()
    alone()
    note = f"compiling takes {time.perf_counter() - start:.1f} s"
    times = in_turn({"compiled add_gradient": alone, "add_gradient": regularizer.add_gradient}, 30)
    record(ratio(NAME, "10 × 64², torch.compile", "compiled add_gradient", "add_gradient", times, note=note))


def main() -> None:
    calls = variants()
    for name, call in calls.items():
        call()
        with Counter() as counter:
            call()
        record(Row(NAME, CASE, name, "", "torch calls", counter.calls))
        goal = 0 if name == "add_gradient" else None
        record(Row(NAME, CASE, name, "", "host reads", counter.reads, at_most=goal))
    times = in_turn(calls, 30)
    for name in list(calls)[1:]:
        record(ratio(NAME, CASE, "add_gradient", name, times))
    try:
        compiled()
    except Exception as error:
        record(failed(NAME, "10 × 64², torch.compile", "compiled", "add_gradient", error))

"""Many small weights: what counts is how often torch is called, and whether a step waits for a value.

Calls and host reads of one step are counted, of a network of 200 weights of 64². Under `torch.compile` a whole step of
a network of 10 such layers is compiled: graph breaks take the place of host reads, and generated kernels that of
calls.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import penalties as by
from benchmarks.alone import linears
from benchmarks.harness import Call, Row, failed, in_turn, ratio, record, spread

NAME = "many small weights"
SECONDS = 110
CASE = "200 × 64²"
COMPILED = "10 × 64², torch.compile"
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
WHY = {
    "torch calls by hand": "The calls by hand take every weight for a plain matrix and check nothing: no zero weight, "
    "no overflow, no gradient that is missing.",
    "autograd penalty": "The compiler fuses the penalty with the network, where `add_gradient` stays a call of its "
    "own, with its look at every weight before each step.",
}
WHY["penalty()"] = WHY["torch's spectral_norm"] = WHY["autograd penalty"]


class Counter(TorchDispatchMode):
    """Counts the operators that run, and those that read a value back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        self.reads += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))


def ways() -> Iterator[tuple[str, Callable[[], Call]]]:
    model = linears(200, 64)
    weights = by.matrices(model)
    vectors = [F.normalize(torch.randn(64), dim=0) for _ in weights]
    yield "add_gradient", lambda: by.ready(model).add_gradient
    yield "penalty()", lambda: by.by_penalty(by.ready(model))
    yield "torch calls by hand", lambda: by.bare(weights, vectors)
    yield "autograd penalty", lambda: by.by_autograd(weights, vectors)
    yield "SVD penalty", lambda: by.by_svd(weights)
    yield "torch's spectral_norm", lambda: by.parametrized_weights(by.normalized(linears(200, 64)))
    yield "deel-torchlip", lambda: by.parametrized_weights(by.lipschitz_layers(linears(200, 64)))


def counted() -> None:
    calls = {}
    for name, make in ways():
        try:
            call = make()
            call()
            with Counter() as counter:
                call()
        except Exception as error:
            record(failed(NAME, CASE, name, "add_gradient", error))
            continue
        calls[name] = call
        record(Row(NAME, CASE, name, "a step", "torch calls", counter.calls))
        more = {"at_most": 0, "goal": "many small weights: no host reads"} if name == "add_gradient" else {}
        record(Row(NAME, CASE, name, "a step", "host reads", counter.reads, **more))
    times = in_turn(calls)
    for name in list(calls)[1:]:
        record(ratio(NAME, CASE, "add_gradient", name, times, why=WHY.get(name, "") if "hand" in name else ""))


class Compiled(NamedTuple):
    """A compiled step, what it took to compile it, and what became of it."""

    step: Call
    seconds: float
    graph_breaks: int
    kernels: int


def compiled(model: nn.Module, loss: Callable[[], torch.Tensor], after: Call = lambda: None) -> Compiled:
    """A step of ``model`` with its ``loss`` compiled; called three times, since some compile anew at the second."""
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    def step() -> None:
        model.zero_grad()
        whole().backward()
        after()

    whole = torch.compile(loss)
    counters.clear()
    metrics.reset()
    start = time.perf_counter()
    for _ in range(3):
        step()
    taken = time.perf_counter() - start
    return Compiled(step, taken, sum(counters["graph_break"].values()), metrics.generated_kernel_count)


def compiled_ways() -> Iterator[tuple[str, Callable[[], Compiled]]]:
    """A compiled training step without a penalty and with each of them, on networks of their own."""
    x, y = torch.randn(64, 64), torch.randint(10, (64,))

    def make() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
        model = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(64, 64), nn.ReLU())])
        return model, lambda: F.cross_entropy(model(x), y)

    def ours(compile_it: bool) -> Compiled:
        model, loss = make()
        act = by.ready(model).add_gradient
        return compiled(model, loss, torch.compile(act) if compile_it else act)

    def term() -> Compiled:
        model, loss = make()
        regularizer = by.ready(model)
        return compiled(model, lambda: loss() + regularizer.penalty())

    def autograd() -> Compiled:
        model, loss = make()
        weights = by.matrices(model)
        vectors = [F.normalize(torch.randn(64), dim=0) for _ in weights]
        return compiled(model, lambda: loss() + by.autograd_term(weights, vectors))

    def normal() -> Compiled:
        model, loss = make()
        by.normalized(model)
        return compiled(model, loss)

    yield "no penalty", lambda: compiled(*make())
    yield "add_gradient, compiled", lambda: ours(True)
    yield "add_gradient, as it is", lambda: ours(False)
    yield "penalty()", term
    yield "autograd penalty", autograd
    yield "torch's spectral_norm", normal


def under_compile() -> None:
    import torch._inductor.config

    torch._inductor.config.force_disable_caches = True
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
    torch.compile(torch.sin)(torch.ones(1))  # what the compiler itself needs at its first use
    found: dict[str, Compiled] = {}
    for name, make in compiled_ways():
        torch._dynamo.reset()
        try:
            found[name] = make()
        except Exception as error:
            record(failed(NAME, COMPILED, name, "no penalty", error))
            continue
        note = f"{found[name].seconds:.1f} s to compile, {found[name].graph_breaks} graph breaks"
        record(Row(NAME, COMPILED, name, "a step", "generated kernels", found[name].kernels, note=note))
    times = in_turn({name: way.step for name, way in found.items()}, 60, 5)
    base = times.pop("no penalty")
    extra = {name: [a - b for a, b in zip(t, base, strict=True)] for name, t in times.items()}
    whole = statistics.median(base) * 1e3
    for name, values in extra.items():
        more = [1e3 * value for value in values]
        record(spread(NAME, COMPILED, name, "no penalty", "ms more", more, note=f"a step without takes {whole:.2f} ms"))
    for name in ("penalty()", "autograd penalty", "torch's spectral_norm"):
        if name in extra:
            case = f"{COMPILED}: what is added"
            record(ratio(NAME, case, "add_gradient, compiled", name, extra, why=WHY[name]))


def main() -> None:
    by.check()
    counted()
    under_compile()

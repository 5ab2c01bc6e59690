"""Many small weights, where what counts is how often torch is called: 200 of 64²; and a compiled step of 10 of them."""

import statistics

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import penalties as by
from benchmarks.harness import Call, compare, differences, lazily, ratios, record, spread, timed

NAME = "many small weights"
COMPILED = "10 × 64², torch.compile"
OURS, SPECTRAL_NORM = "add_gradient", "torch's spectral_norm"
WAYS = (OURS, "penalty()", "torch calls by hand", "autograd penalty", "SVD penalty")
WHY = {
    "torch calls by hand": "The calls by hand take every weight for a plain matrix and check nothing: no zero weight, "
    "no overflow, no gradient that is missing.",
    "compiled": "The compiler fuses the penalty with the network, where `add_gradient` stays a call of its own, with "
    "its look at every weight before each step.",
}


def compared() -> None:
    model = by.linears(200, 64)
    calls = {name: act for name, act in by.ways(model).items() if name in WAYS}
    calls[SPECTRAL_NORM] = by.parametrized_weights(by.normalized(by.linears(200, 64)))
    calls["deel-torchlip"] = lazily(lambda: by.parametrized_weights(by.lipschitz_layers(by.linears(200, 64))))
    compare(NAME, "200 × 64²", calls, [(OURS, name, {"why": WHY.get(name, "")}) for name in list(calls)[1:]])


def compiled(way: str) -> Call:
    """A step of a network with a penalty, whose loss is compiled."""
    model = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(64, 64), nn.ReLU())])
    x, y = torch.randn(64, 64), torch.randint(10, (64,))
    regularizer, weights = by.ready(model), by.matrices(model)
    vectors = [F.normalize(torch.randn(64), dim=0) for _ in weights]
    terms = {"penalty()": regularizer.penalty, "autograd penalty": lambda: by.autograd_term(weights, vectors)}
    acts = {"add_gradient, as it is": regularizer.add_gradient}
    acts |= {"add_gradient, compiled": torch.compile(regularizer.add_gradient)}
    if way == SPECTRAL_NORM:
        by.normalized(model)
    term, act = terms.get(way), acts.get(way, lambda: None)

    @torch.compile
    def loss() -> Tensor:
        alone = F.cross_entropy(model(x), y)
        return alone if term is None else alone + term()

    def step() -> None:
        model.zero_grad()
        loss().backward()
        act()

    return step


def under_compile() -> None:
    torch._dynamo.config.recompile_limit = 64  # all ways share the function `loss`
    names = "add_gradient, compiled", "add_gradient, as it is", "penalty()", "autograd penalty", SPECTRAL_NORM
    times = timed(NAME, COMPILED, {name: compiled(name) for name in ("no penalty", *names)}, 60, warmup=5)
    added, whole = differences(times, "no penalty"), statistics.median(times["no penalty"])
    for name, extra in added.items():
        note = f"a step without takes {1e3 * whole:.2f} ms"
        record(spread(NAME, COMPILED, name, "no penalty", "ms more", [1e3 * t for t in extra], note=note))
    rows = [(names[0], other, {"why": WHY["compiled"]}) for other in names[2:]]
    ratios(NAME, f"{COMPILED}: what is added", added, rows)


def main() -> None:
    compared()
    under_compile()

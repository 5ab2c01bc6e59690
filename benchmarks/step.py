"""What the penalty adds to a training step at batch 64, in each of the ways to have one.

Whole steps, with and without, in turn. What a penalty adds does not depend on the batch, but the spread of a step does:
ways that add less than a step of 64 varies are told apart in steps of 2 or 4. The slowest ways are timed by themselves,
with the caches swept before, as a backward pass leaves them; of deel-torchlip, whose layers compute their weights anew,
that is the time of computing each and taking its gradient back, less the accumulation that a plain weight has, too.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import penalties as by
from benchmarks.harness import ROUNDS, Call, failed, in_turn, ratio, record, spread, sweep
from spectreg.weights.input_sizes import input_sizes
from spectreg_lab.models import build
from spectreg_lab.settings.config import NIN, VGG, DenseNet

NAME = "training step"
SECONDS = 470
UNIT = "% of a step"
OURS = "add_gradient"
WHY = {
    "floor": "A power step reads each weight once from memory and again from cache, where the floor reads it once; and "
    "normalising all vectors takes a while that does not depend on the size of the weights. `steps=0.5` reads once.",
    "torch's weight decay": "Decay needs no vectors: it is one pass over the weights inside the optimizer's own.",
    "autograd penalty": "Of packed query, key and value weights ours keeps a vector each; the autograd penalty as "
    "anyone would write it takes them for one matrix.",
}


class Transformer(nn.Module):
    """Four layers of width 256 on sequences of 32 vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(1024, 1024), nn.ReLU())])


class Network(NamedTuple):
    """``limit``: per cent of a step at B=64 that the penalty may add. ``decides``: the batch that tells ways apart."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    limit: float | None
    kind: str = "the paper's networks"
    rounds: int = ROUNDS
    decides: int = 2


SPECTRAL_NORM = "torch's spectral_norm"
BACK = "a step that does not count"
WAYS = (
    OURS,
    "half steps",
    "penalty()",
    "decoupled",
    "floor",
    "torch's weight decay",
    "autograd penalty",
    SPECTRAL_NORM,
)
SLOW = (OURS, "floor", "every=8", "strength=0", "log()", "operator map", "SVD penalty", "deel-torchlip")
PHOTOGRAPH = (3, 32, 32)
NETWORKS = {
    "MLP 5 × 1024": Network(mlp, (1024,), None, rounds=90, decides=64),
    "transformer 4 × 256": Network(Transformer, (32, 256), 4.0, "the transformer", decides=4),
    "VGG": Network(lambda: build(VGG(), PHOTOGRAPH, 10), PHOTOGRAPH, 1.0, rounds=31),
    "NIN": Network(lambda: build(NIN(), PHOTOGRAPH, 10), PHOTOGRAPH, 1.0, rounds=25),
    "DenseNet": Network(lambda: build(DenseNet(), PHOTOGRAPH, 10), PHOTOGRAPH, 1.0),
}


def sgd(model: nn.Module, **settings: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True, **settings)  # type: ignore[arg-type]


def train_step(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, act: Call) -> Call:
    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), y).backward()
        act()
        optimizer.step()

    return step


class Way(NamedTuple):
    """What a way of having a penalty does in a step, and for how many steps that is."""

    act: Call
    calls: int = 1


def additions(model: nn.Module) -> dict[str, Way]:
    """The ways that act between ``backward`` and the optimizer."""
    weights = by.matrices(model)
    vectors = [F.normalize(torch.randn(W[0].numel()), dim=0) for W in weights]
    eighth = by.ready(model, every=8)
    return {
        OURS: Way(by.ready(model).add_gradient),
        "half steps": Way(by.ready(model, steps=0.5).add_gradient),
        "every=8": Way(lambda: [eighth.add_gradient() for _ in range(8)], 8),
        "strength=0": Way(by.ready(model, 0).add_gradient),
        "log()": Way(by.ready(model, 0).log),
        "penalty()": Way(by.by_penalty(by.ready(model))),
        "floor": Way(by.floor(weights)),
        "autograd penalty": Way(by.by_autograd(weights, vectors)),
        "SVD penalty": Way(by.by_svd(weights)),
    }


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """The ways that act inside of the optimizer's step."""
    found = {"vanilla": sgd(model), "decoupled": sgd(model), "torch's weight decay": sgd(model, weight_decay=1e-4)}
    by.ready(model, decoupled=True).attach(found["decoupled"])
    return found


def whole_steps(
    model: nn.Module, x: Tensor, y: Tensor, ways: Sequence[str], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of whole steps in turn. The model is shared, but for the way that changes how its weights are made.

    After that one the shared model is out of the caches: a step that does not count brings it back.
    """
    inside, between = optimizers(model), additions(model)
    steps = {name: train_step(model, x, y, inside[name], lambda: None) for name in inside}
    steps |= {name: train_step(model, x, y, inside["vanilla"], way.act) for name, way in between.items()}
    if SPECTRAL_NORM in ways:
        peer = by.normalized(copy.deepcopy(model))
        steps = {BACK: steps["vanilla"], **steps, SPECTRAL_NORM: train_step(peer, x, y, sgd(peer), lambda: None)}
    times = in_turn({name: steps[name] for name in (BACK, "vanilla", *ways) if name in steps}, rounds, warmup)
    return {name: times[name] for name in ("vanilla", *ways)}


def by_itself(case: str, model: nn.Module, x: Tensor) -> dict[str, list[float]]:
    """Seconds that each of the slow ways adds."""
    ways = additions(model) | {"accumulation": Way(by.accumulation(by.matrices(model)))}
    convolutions = {f"{n}.weight".lstrip("."): "operator" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if convolutions:
        operator = by.ready(model, map=convolutions, input_size=input_sizes(model, x), warmup=1)
        ways["operator map"] = Way(operator.add_gradient)
    try:
        act = by.parametrized_weights(by.lipschitz_layers(copy.deepcopy(model)))
        act()
        ways["deel-torchlip"] = Way(act)
    except Exception as error:
        record(failed(NAME, case, "deel-torchlip", "vanilla step", error))
    chosen = {name: ways[name] for name in (*SLOW, "accumulation") if name in ways}
    times = in_turn({name: way.act for name, way in chosen.items()}, ROUNDS, 1, sweep)
    if "deel-torchlip" in times:
        times["deel-torchlip"] = less(times["deel-torchlip"], times["accumulation"])
    return {name: [t / chosen[name].calls for t in times[name]] for name in chosen if name != "accumulation"}


def less(times: Sequence[float], base: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(times, base, strict=True)]


def added(case: str, times: Mapping[str, list[float]], step: float, **stated: Any) -> None:
    """Rows of what each way adds, in per cent of a step of ``step`` seconds; ``stated`` goes with the row of ours."""
    for name, extra in times.items():
        note = f"{statistics.median(extra) * 1e3:.2f} ms"
        more = stated if name == OURS else {}
        if name == "every=8" and case.startswith("MLP"):
            more = {"at_most": 3.0, "goal": "a step: on the MLP at most 3 % more with every=8"}
        record(spread(NAME, case, name, "vanilla step", UNIT, [100 * t / step for t in extra], note=note, **more))


def compare(case: str, times: Mapping[str, list[float]], error: float) -> None:
    """Rows of what ours adds over what each of the peers adds."""
    goals = {
        "autograd penalty": (1.0, "a step: adds less than the autograd penalty"),
        SPECTRAL_NORM: (0.5, "a step: adds at most half of what torch's spectral_norm does"),
    }
    others = ["autograd penalty", SPECTRAL_NORM, "SVD penalty", "deel-torchlip"]
    if case.startswith("MLP"):  # elsewhere these two add too little for a ratio
        goals["floor"] = (1.5, "a step: on the MLP at most 1.5 × what the floor adds")
        others = ["floor", "torch's weight decay", *others]
    for other in others:
        if other in times:
            limit, goal = goals.get(other, (None, ""))
            same = None if other in (SPECTRAL_NORM, "torch's weight decay", "deel-torchlip") else error
            why = WHY.get(other, "")
            record(ratio(NAME, case, OURS, other, times, at_most=limit, goal=goal, why=why, error=same))


def measure(name: str, network: Network, error: float) -> None:
    """All rows of a network."""
    torch.manual_seed(0)
    model, x, y = by.with_gradients(network.make()), torch.randn(64, *network.shape), torch.randint(10, (64,))
    few = network.decides
    times = whole_steps(model, x, y, WAYS if few == 64 else (OURS,), network.rounds)
    step, extra = statistics.median(times["vanilla"]), differences(times)
    decided = extra if few == 64 else differences(whole_steps(model, x[:few], y[:few], WAYS, 3 * ROUNDS))
    stated = {}
    if network.limit:
        floor = 100 * statistics.median(decided["floor"]) / step
        why = f"The floor alone, which reads each weight once and its gradient, adds {floor:.2g} %."
        goal = f"a step: at most {network.limit:g} % more on {network.kind}"
        stated = {"at_most": network.limit, "goal": goal, "why": why}
    added(f"{name}, B=64: whole steps of {step * 1e3:.0f} ms", extra, step, **stated)
    if few < 64:
        added(f"{name}: whole steps of B={few}, in % of one of B=64", decided, step)
    compare(f"{name}: what is added, whole steps of B={few}", decided, error)
    slow = by_itself(f"{name}: by itself", model, x)
    added(f"{name}: by itself, in % of a step of B=64", slow, step)
    compare(f"{name}: what is added, by itself", slow, error)


def differences(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Of each way to the steps without."""
    return {name: less(taken, times["vanilla"]) for name, taken in times.items() if name != "vanilla"}


def main() -> None:
    error = by.check()
    for name, network in NETWORKS.items():
        measure(name, network, error)

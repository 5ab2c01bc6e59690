"""What the penalty adds to a training step at batch 64, in each of the ways to have one.

Whole steps, with and without, are timed in turn; they decide the goals wherever the effect is larger than the spread
of a step. What each way adds is also timed by itself, with the caches swept before, as a backward pass leaves them: for
effects too small for whole steps. Torch's `spectral_norm` and deel-torchlip are parametrizations: theirs is the time
of computing every weight and taking its gradient back, one layer after the other, less the accumulation that a plain
weight has, too.
"""

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import penalties as by
from benchmarks.harness import ROUNDS, Call, failed, in_turn, ratio, record, same, spread, sweep
from spectreg.operators import input_sizes
from spectreg_lab.config import NIN, VGG, DenseNet
from spectreg_lab.models import build

NAME = "training step"
SECONDS = 430
UNIT = "% of a step"
OURS = "add_gradient"
WHY = {
    "floor": "A power step reads each weight twice, the second time from cache, where the floor reads it once; and "
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
    """``limit``: per cent of a step that the penalty may add; ``whole``: ways that are timed as whole steps."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    limit: float | None
    whole: tuple[str, ...]
    rounds: int = ROUNDS


PHOTOGRAPH = (3, 32, 32)
FEW, MANY = (OURS, "torch's spectral_norm"), (OURS, "torch's spectral_norm", "floor", "autograd penalty", "half steps")
NETWORKS = {
    "MLP 5 × 1024": Network(mlp, (1024,), None, (*MANY, "penalty()", "decoupled", "torch's weight decay"), 45),
    "transformer 4 × 256": Network(Transformer, (32, 256), 4.0, MANY),
    "VGG": Network(lambda: build(VGG(), PHOTOGRAPH, 10), PHOTOGRAPH, 1.0, FEW, 31),
    "NIN": Network(lambda: build(NIN(), PHOTOGRAPH, 10), PHOTOGRAPH, 1.0, FEW, 25),
    "DenseNet": Network(lambda: build(DenseNet(), PHOTOGRAPH, 10), PHOTOGRAPH, 1.0, FEW),
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


def check() -> float:
    """All ways add the same gradient, once their vectors have converged."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(3)])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.outer(torch.randn(64), torch.randn(64)) / 8)
    weights = by.matrices(model)
    vectors = [torch.linalg.svd(W.detach())[2][0].clone() for W in weights]
    ours = by.ready(model, 1.0, warmup=60)
    acts = {"ours": ours.add_gradient, "penalty()": by.by_penalty(ours), "floor": by.floor(weights, vectors, 1.0)}
    acts |= {"autograd": by.by_autograd(weights, vectors, 1.0), "SVD": by.by_svd(weights, 1.0)}
    found = {}
    for name, act in acts.items():
        by.with_gradients(model)
        act()
        found[name] = torch.cat([W.grad.flatten() for W in weights])
    return max(same(name, g, found["ours"], 1e-4) for name, g in found.items())


class Way(NamedTuple):
    """What a way of having a penalty does in a step, and what that takes the place of."""

    act: Call
    instead_of: str | None = None
    calls: int = 1


def additions(model: nn.Module) -> dict[str, Way]:
    """The ways that act between ``backward`` and the optimizer."""
    weights = by.matrices(model)
    vectors = [F.normalize(torch.randn(W[0].numel()), dim=0) for W in weights]
    eighth = by.ready(model, every=8)
    return {
        OURS: Way(by.ready(model).add_gradient),
        "half steps": Way(by.ready(model, steps=0.5).add_gradient),
        "every=8": Way(lambda: [eighth.add_gradient() for _ in range(8)], None, 8),
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


def whole_steps(case: str, network: Network, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Seconds of whole steps in turn. The model is shared, but for those that change its weights' definition."""
    inside, between = optimizers(model), additions(model)
    steps = {name: train_step(model, x, y, inside[name], lambda: None) for name in inside}
    steps |= {name: train_step(model, x, y, inside["vanilla"], way.act) for name, way in between.items()}
    peer = by.normalized(copy.deepcopy(model))
    steps["torch's spectral_norm"] = train_step(peer, x, y, sgd(peer), lambda: None)
    return in_turn({name: steps[name] for name in ("vanilla", *network.whole)}, network.rounds, 2)


def alone(case: str, model: nn.Module, x: Tensor) -> dict[str, list[float]]:
    """Seconds that each way adds, timed by itself with swept caches."""
    ways = additions(model)
    inside = optimizers(model)
    ways |= {name: Way(optimizer.step, "vanilla") for name, optimizer in inside.items()}
    ways["accumulation"] = Way(by.accumulation(by.matrices(model)))
    convolutions = {f"{n}.weight".lstrip("."): "operator" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if convolutions:
        operator = by.ready(model, map=convolutions, input_size=input_sizes(model, x), warmup=1)
        ways["operator map"] = Way(operator.add_gradient)
    for name, change in (("torch's spectral_norm", by.normalized), ("deel-torchlip", by.lipschitz_layers)):
        try:
            act = by.parametrized_weights(change(copy.deepcopy(model)))
            act()
            ways[name] = Way(act, "accumulation")
        except Exception as error:
            record(failed(NAME, case, name, "vanilla step", error))
    times = in_turn({name: way.act for name, way in ways.items()}, ROUNDS, 1, sweep)
    return {
        name: [(a - b) / way.calls for a, b in zip(times[name], times[way.instead_of], strict=True)]
        if way.instead_of
        else [a / way.calls for a in times[name]]
        for name, way in ways.items()
        if name not in ("vanilla", "accumulation")
    }


def added(case: str, times: Mapping[str, list[float]], step: float, limit: float | None, error: float) -> None:
    """Rows of what each way adds, in per cent of a step of ``step`` seconds."""
    for name, extra in times.items():
        more = {"at_most": limit, "goal": f"a step: at most {limit:g} % more"} if limit and name == OURS else {}
        note = f"{statistics.median(extra) * 1e3:.2f} ms"
        percent = [100 * t / step for t in extra]
        record(spread(NAME, case, name, "vanilla step", UNIT, percent, error=error, note=note, **more))


def compare(case: str, times: Mapping[str, list[float]], how: str) -> None:
    """Rows of what ours adds over what each of the others adds."""
    goals = {
        "autograd penalty": (1.0, "a step: adds less than the autograd penalty"),
        "torch's spectral_norm": (0.5, "a step: adds at most half of what torch's spectral_norm does"),
    }
    if case.startswith("MLP"):
        goals["floor"] = (1.5, "a step: on the MLP at most 1.5 × what the floor adds")
    for other in (*WHY, "torch's spectral_norm", "SVD penalty", "deel-torchlip"):
        if other in times:
            limit, goal = goals.get(other, (None, ""))
            more = {"at_most": limit, "goal": goal, "why": WHY.get(other, ""), "note": how}
            record(ratio(NAME, f"{case}: what is added", OURS, other, times, **more))


def main() -> None:
    error = check()
    for name, network in NETWORKS.items():
        torch.manual_seed(0)
        case, model = f"{name}, B=64", by.with_gradients(network.make())
        x, y = torch.randn(64, *network.shape), torch.randint(10, (64,))
        whole = whole_steps(case, network, model, x, y)
        base = whole.pop("vanilla")
        step = statistics.median(base)
        in_steps = {n: [a - b for a, b in zip(times, base, strict=True)] for n, times in whole.items()}
        by_itself = alone(case, model, x)
        added(f"{case}: whole steps of {step * 1e3:.0f} ms", in_steps, step, network.limit, error)
        added(f"{case}: each by itself", by_itself, step, None, error)
        # On the MLP, and there alone, every effect is larger than the spread of a step.
        decided = in_steps if name.startswith("MLP") else {}
        compare(case, decided, "whole steps")
        compare(case, {n: t for n, t in by_itself.items() if n == OURS or n not in decided}, "by itself")

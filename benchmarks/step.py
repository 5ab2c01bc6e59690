"""What the penalty adds to a training step at batch 64, in each of the ways to have one.

Whole steps, with and without, in turn. What a penalty adds does not depend on the batch, but the spread of a step does:
ways that add less than a step of 64 varies are told apart in steps of 2 or 4. The slowest ways are timed by themselves,
with the caches swept before, as a backward pass leaves them; of deel-torchlip, whose layers compute their weights anew,
that is the time of computing each and taking its gradient back, less the accumulation that a plain weight has, too.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import penalties as by
from benchmarks.harness import ROUNDS, Call, Ratio, Times, differences, in_turn, lazily, ratios, record, spread, timed
from spectreg_lab.models import build
from spectreg_lab.settings.config import NIN, VGG, DenseNet

NAME = "training step"
OURS, SPECTRAL_NORM = "add_gradient", "torch's spectral_norm"
BACK, PLAIN = "a step that does not count", "accumulation alone"
WHOLE = (OURS, "half steps", "penalty()", "floor", "torch's weight decay", "autograd penalty", SPECTRAL_NORM)
ALONE = (OURS, "floor", "every=8", "strength=0", "log()", "SVD penalty", "deel-torchlip")
ROWS: list[Ratio] = [
    (OURS, "autograd penalty", {"at_most": 1.0, "why": "Of packed query, key and value weights ours keeps a vector "
     "each; the autograd penalty as anyone would write it takes them for one matrix."}),
    (OURS, SPECTRAL_NORM, {"at_most": 0.5}),
    (OURS, "SVD penalty", {}),
    (OURS, "deel-torchlip", {}),
]  # fmt: skip
ROWS_OF_THE_MLP: list[Ratio] = [  # elsewhere these two add too little for a ratio
    (OURS, "floor", {"at_most": 1.5, "why": "A power step reads each weight once from memory and again from cache, "
     "where the floor reads it once. `steps=0.5` reads once."}),
    (OURS, "torch's weight decay", {"why": "Decay is one pass over the weights inside the optimizer's own."}),
]  # fmt: skip


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
    """``decides``: the batch that tells ways apart. ``limit``: per cent of a step at B=64 that the penalty may add."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    decides: int = 2
    limit: float | None = 1.0
    rounds: int = 3 * ROUNDS


PHOTOGRAPH = (3, 32, 32)
NETWORKS = {
    "MLP 5 × 1024": Network(mlp, (1024,), decides=64, limit=None, rounds=90),
    "transformer 4 × 256": Network(Transformer, (32, 256), decides=4, limit=4.0),
    "VGG": Network(lambda: build(VGG(), PHOTOGRAPH, 10), PHOTOGRAPH),
    "NIN": Network(lambda: build(NIN(), PHOTOGRAPH, 10), PHOTOGRAPH),
    "DenseNet": Network(lambda: build(DenseNet(), PHOTOGRAPH, 10), PHOTOGRAPH),
}


def sgd(model: nn.Module, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=decay)


def train_step(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, act: Call) -> Call:
    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), y).backward()
        act()
        optimizer.step()

    return step


def whole_steps(
    model: nn.Module, x: Tensor, y: Tensor, ways: Sequence[str], rounds: int, warmup: int = 2,
    clock: Callable[[], float] = time.process_time,
) -> Times:  # fmt: skip
    """Seconds of whole steps in turn. The model is shared, but for the way that changes how its weights are made.

    After that one the shared model is out of the caches: a step that does not count brings it back.
    """
    optimizer = sgd(model)
    acts = {"vanilla": lambda: None, BACK: lambda: None, **by.ways(model)}
    steps = {name: train_step(model, x, y, optimizer, act) for name, act in acts.items()}
    steps["torch's weight decay"] = train_step(model, x, y, sgd(model, 1e-4), acts[BACK])
    if SPECTRAL_NORM in ways:
        peer = by.normalized(copy.deepcopy(model))
        steps[SPECTRAL_NORM] = train_step(peer, x, y, sgd(peer), acts[BACK])
    first = [BACK] * (SPECTRAL_NORM in ways)
    times = in_turn({name: steps[name] for name in (*first, "vanilla", *ways)}, rounds, warmup, clock=clock)
    return {name: times[name] for name in ("vanilla", *ways)}


@cache
def buffer() -> Tensor:
    return torch.zeros(2**24)


def sweep() -> None:
    """Put everything out of the caches, as the passes of a network leave them."""
    buffer().add_(1.0)


def by_itself(case: str, model: nn.Module) -> Times:
    """Seconds that each of the slow ways takes."""
    peer = lazily(lambda: by.parametrized_weights(by.lipschitz_layers(copy.deepcopy(model))))
    ways = by.ways(model) | {"deel-torchlip": peer, PLAIN: by.accumulation(by.matrices(model))}
    times = timed(NAME, case, {name: ways[name] for name in (*ALONE, PLAIN)}, warmup=1, between=sweep)
    times["every=8"] = [seconds / 8 for seconds in times["every=8"]]
    net = {name: taken for name, taken in differences(times, PLAIN).items() if name == "deel-torchlip"}
    return {name: taken for name, taken in times.items() if name != PLAIN} | net


def tell(name: str, how: str, added: Times, step: float, limits: dict[str, float | None]) -> None:
    """What each way adds, in per cent of a step of ``step`` seconds, and what ours adds over what the peers add."""
    for way, extra in added.items():
        note = f"{1e3 * statistics.median(extra):.2f} ms of {1e3 * step:.0f} ms"
        percent = [100 * seconds / step for seconds in extra]
        case, limit = f"{name}: {how}, in % of a step of B=64", limits.get(way)
        record(spread(NAME, case, way, "vanilla step", "% of a step", percent, note=note, at_most=limit))
    ratios(NAME, f"{name}: what is added, {how}", added, ROWS + ROWS_OF_THE_MLP * name.startswith("MLP"))


def main() -> None:
    for name, network in NETWORKS.items():
        torch.manual_seed(0)
        few = network.decides
        model, x, y = by.with_gradients(network.make()), torch.randn(64, *network.shape), torch.randint(10, (64,))
        step = statistics.median(whole_steps(model, x, y, (), ROUNDS)["vanilla"])
        added = differences(whole_steps(model, x[:few], y[:few], WHOLE, network.rounds))
        tell(name, f"whole steps of B={few}", added, step, {OURS: network.limit})
        every = 3.0 if name.startswith("MLP") else None
        tell(name, "by itself", by_itself(f"{name}: by itself", model), step, {"every=8": every})

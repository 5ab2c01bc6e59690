"""A training step: what the penalty adds to it, in each of the ways to have one.

What can be told apart from the rest of a step is timed from within it: one step of the network, then each penalty in
turn with the caches swept, as a backward pass leaves them. What changes the forward pass itself (spectral_norm,
deel-torchlip) is timed as whole steps in turn, too, on the MLP, the transformer and the VGG.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import penalties as by
from benchmarks.harness import ROUNDS, Call, Row, failed, in_turn, quartiles, ratio, record, same, seconds, sweep
from spectreg.operators import input_sizes
from spectreg_lab.config import NIN, VGG, DenseNet
from spectreg_lab.models import build

NAME = "training step"


class Transformer(nn.Module):
    """Four layers of width 256 on sequences of 32 vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x).mean(1))


def mlp(linear: Callable[..., nn.Module] = nn.Linear) -> nn.Module:
    return nn.Sequential(*[layer for _ in range(5) for layer in (linear(1024, 1024), nn.ReLU())])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float | None]] = {
    "MLP 5 × 1024": (mlp, (1024,), None),
    "transformer 4 × 256": (Transformer, (32, 256), 1.04),
    "VGG": (lambda: build(VGG(), (3, 32, 32), 10), (3, 32, 32), 1.01),
    "NIN": (lambda: build(NIN(), (3, 32, 32), 10), (3, 32, 32), 1.01),
    "DenseNet": (lambda: build(DenseNet(), (3, 32, 32), 10), (3, 32, 32), 1.01),
}


def train_step(model: nn.Module, x: Tensor, y: Tensor, act: Call = lambda: None) -> Call:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True)

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


def acts_of(model: nn.Module, x: Tensor) -> dict[str, tuple[Call, str | None]]:
    """Each way of having a penalty, and what it takes the place of."""
    weights = by.matrices(model)
    vectors = [F.normalize(torch.randn(W[0].numel()), dim=0) for W in weights]
    eighth = by.ready(model, every=8)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=d) for d in (0.0, 1e-4, 0.0)]
    by.ready(model, decoupled=True).attach(optimizers[2])
    normal = by.normalized(copy.deepcopy(model))
    acts: dict[str, tuple[Call, str | None]] = {
        "floor": (by.floor(weights), None),
        "add_gradient": (by.ready(model).add_gradient, None),
        "add_gradient, half steps": (by.ready(model, steps=0.5).add_gradient, None),
        "add_gradient, every=8 (8 calls)": (lambda: [eighth.add_gradient() for _ in range(8)], None),
        "penalty()": (by.by_penalty(by.ready(model)), None),
        "SGD": (optimizers[0].step, None),
        "decoupled": (optimizers[2].step, "SGD"),
        "torch's weight decay": (optimizers[1].step, "SGD"),
        "autograd penalty": (by.by_autograd(weights, vectors), None),
        "torch's spectral_norm": (by.parametrized_weights(normal), None),
    }
    convolutions = {f"{n}.weight".lstrip("."): "operator" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if convolutions:
        operator = by.ready(model, map=convolutions, input_size=input_sizes(model, x), warmup=1)
        acts["add_gradient, operator"] = operator.add_gradient, None
    return acts


def within(case: str, model: nn.Module, x: Tensor, y: Tensor, limit: float | None, error: float) -> None:
    """Rows of what each way adds to a step of this network."""
    acts = acts_of(by.with_gradients(model), x)
    step = train_step(model, x, y)
    heavy = x.ndim == 4
    base = in_turn({"step": step}, 3 if heavy else ROUNDS, 1)["step"]
    times = in_turn({name: act for name, (act, _) in acts.items()}, ROUNDS, 1, sweep)
    whole = statistics.median(base)
    decompose = by.by_svd(by.matrices(model))
    times["SVD penalty"] = [seconds(decompose) for _ in range(1 if heavy else 3)]
    added = {
        name: [a - b for a, b in zip(t, times[acts[name][1]], strict=True)] if acts.get(name, (0, None))[1] else t
        for name, t in times.items()
        if name != "SGD"
    }
    added["add_gradient, every=8 (8 calls)"] = [t / 8 for t in added["add_gradient, every=8 (8 calls)"]]
    for name, extra in added.items():
        low, middle, high = (1 + q / whole for q in quartiles(extra))
        goal = limit if name == "add_gradient" else None
        note = f"adds {statistics.median(extra) * 1e3:.2f} ms"
        taken = whole + statistics.median(extra)
        row = Row(NAME, case, name, "vanilla step", "×", middle, low, high, len(extra), taken, whole, goal)
        record(replace(row, error=error, note=note))
    ours = {name: added[name] for name in ("add_gradient", "floor", "autograd penalty", "torch's spectral_norm")}
    limits = {"floor": 1.5 if case.startswith("MLP") else None, "autograd penalty": 1.0, "torch's spectral_norm": 0.5}
    for other, at_most in limits.items():
        record(ratio(NAME, f"{case}: what is added", "add_gradient", other, ours, at_most=at_most))


def torchlip(model: nn.Module) -> nn.Module:
    """The model with deel-torchlip's layers in place of the linear layers and convolutions."""
    from deel.torchlip.modules import SpectralConv2d, SpectralLinear

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                bias = child.bias is not None
                setattr(parent, name, SpectralConv2d(child.in_channels, child.out_channels, 3, padding=1, bias=bias))
            elif isinstance(child, nn.Linear):
                setattr(parent, name, SpectralLinear(child.in_features, child.out_features))
    return model


def whole_steps(case: str, make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> None:
    """Rows of whole steps in turn."""
    ours = make()
    steps = {
        "vanilla": train_step(make(), x, y),
        "add_gradient": train_step(ours, x, y, by.ready(ours).add_gradient),
        "torch's spectral_norm": train_step(by.normalized(make()), x, y),
    }
    if case != "transformer 4 × 256":
        try:
            peer = train_step(torchlip(make()), x, y)
            peer()
            steps["deel-torchlip"] = peer
        except Exception as error:
            record(failed(NAME, f"{case}, whole steps", "deel-torchlip", "vanilla", error))
    times = in_turn(steps, ROUNDS, 1)
    for name in list(steps)[1:]:
        record(ratio(NAME, f"{case}, whole steps", name, "vanilla", times))


def main() -> None:
    error = check()
    for case, (make, shape, limit) in NETWORKS.items():
        torch.manual_seed(0)
        x, y = torch.randn(64, *shape), torch.randint(10, (64,))
        within(f"{case}, B=64", make(), x, y, limit, error)
        if case not in ("NIN", "DenseNet"):
            whole_steps(case, make, x, y)

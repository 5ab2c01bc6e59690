"""What a step of the regularizer costs, beside the hardware's floor and beside bare torch calls, in turn.

    OMP_NUM_THREADS=1 python benchmarks/regularizer.py [row ...]

Each row is measured A B A B …; printed are the medians and the median of the paired ratios or differences with its
quartiles. Times are of the processor (one thread): what other processes do then counts only as far as they crowd the
caches and the memory. The floor of a gradient penalty is one read of W and one read-modify-write of its gradient.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectreg import SpectralNormRegularizer


def seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def compare(
    row: str, ours: Callable[[], object], other: Callable[[], object], pairs: int, limit: str, per: int = 1
) -> None:
    """Print ``ours`` against ``other``: medians in milliseconds, the paired ratio and the paired difference."""
    for _ in range(3):
        ours(), other()
    times = [(seconds(ours) / per, seconds(other) / per) for _ in range(pairs)]
    a, b = (statistics.median(t) * 1e3 for t in zip(*times, strict=True))
    ratio, difference = (statistics.quantiles(x, n=4) for x in ([p / q for p, q in times], [p - q for p, q in times]))
    low, middle, high = (d * 1e3 for d in difference)
    print(
        f"{row:<44} {a:9.3f} ms {b:9.3f} ms   ratio {ratio[1]:.3f} [{ratio[0]:.3f}, {ratio[2]:.3f}]   "
        f"difference {middle:+.3f} ms [{low:+.3f}, {high:+.3f}]   ({limit})",
        flush=True,
    )


def linears(count: int, size: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(count)])


def ready(model: nn.Module, **settings: object) -> SpectralNormRegularizer:
    """A regularizer past its warmup, on a model whose gradients are there."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    regularizer = SpectralNormRegularizer(model, 1e-9, **settings)  # type: ignore[arg-type]
    regularizer.add_gradient()
    return regularizer


def floor_of(weights: list[Tensor]) -> Callable[[], None]:
    """One read of each W (a matrix-vector product) and one read-modify-write of its gradient (a rank-one add)."""
    vectors = [(torch.randn(W[0].numel()), torch.zeros(len(W))) for W in weights]

    def floor() -> None:
        for W, (v, u) in zip(weights, vectors, strict=True):
            torch.mv(W.detach().flatten(1), v, out=u)
            W.grad.flatten(1).addr_(u, v, alpha=1e-9)

    return floor


def large() -> None:
    for steps, limit in ((1, "at most 1.4"), (0.5, "at most 1.08")):
        model = linears(6, 4096)
        compare(f"100 M parameters, steps={steps}, floor", ready(model, steps=steps).add_gradient,
                floor_of(list(model.parameters())), 15, limit)  # fmt: skip


def small() -> None:
    model = linears(40, 160)
    regularizer = ready(model)
    vectors = [(W, torch.randn(160), torch.empty(160), torch.empty(160)) for W in model.parameters()]

    @torch.no_grad()
    def bare() -> None:
        for W, v, u, w in vectors:
            torch.mv(W, v, out=u)
            u.div_(torch.linalg.vector_norm(u))
            torch.mv(W.t(), u, out=w)
            torch.div(w, torch.linalg.vector_norm(w), out=v)
            W.grad.addr_(u, w, alpha=1e-9)

    compare("1 M in 40 layers, bare torch calls", regularizer.add_gradient, bare, 200, "at most +1.0 ms")


def train_step(model: nn.Module, x: Tensor, y: Tensor, act: Callable[[], None]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        act()
        optimizer.step()

    return step


def mlp() -> None:
    """All variants in turn, so that what each adds to a step is compared within the same moments."""
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    model = nn.Sequential(*layers)
    x, y = torch.randn(64, 1024), torch.randint(10, (64,))
    acts = {
        "nothing": lambda: None,
        "the floor": floor_of([p for p in model.parameters() if p.ndim > 1]),
        "whole steps": ready(model).add_gradient,
        "steps=0.5": ready(model, steps=0.5).add_gradient,
    }
    lazy = ready(model, every=8).add_gradient
    steps = {name: train_step(model, x, y, act) for name, act in acts.items()} | {
        "eight of nothing": eight(train_step(model, x, y, acts["nothing"])),
        "eight of every=8": eight(train_step(model, x, y, lazy)),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(61):
        for name, step in steps.items():
            times[name].append(seconds(step))
    base = statistics.median(times["nothing"])
    added = {n: statistics.median(a - b for a, b in zip(t, times["nothing"], strict=True)) for n, t in times.items()}
    for name in ("the floor", "whole steps", "steps=0.5"):
        ratio = added[name] / added["the floor"]
        print(
            f"MLP 5 × 1024, B=64: {name:<12} +{added[name] * 1e3:.2f} ms on {base * 1e3:.1f} ms, "
            f"{added[name] / base:+.1%}, {ratio:.2f} × the floor (at most 1.5)"
        )
    every = statistics.median(a / b for a, b in zip(times["eight of every=8"], times["eight of nothing"], strict=True))
    print(f"MLP 5 × 1024, B=64: every=8 adds {every - 1:+.1%} over 8 steps (at most +3 %)", flush=True)


def eight(step: Callable[[], None]) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(8):
            step()

    return steps


def networks() -> None:
    from spectreg_lab.config import NIN, VGG, DenseNet
    from spectreg_lab.models import build

    for name, setting in {"VGG": VGG(), "NIN": NIN(), "DenseNet": DenseNet()}.items():
        model = build(setting, (3, 32, 32), 10)
        x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
        act, inside = ready(model).add_gradient, []
        step = train_step(model, x, y, lambda act=act, inside=inside: inside.append(seconds(act)))
        times = [seconds(step) for _ in range(6)][1:]
        shares = [a / (t - a) for a, t in zip(inside[1:], times, strict=True)]
        print(
            f"{name}, B=64: add_gradient {statistics.median(inside) * 1e3:.2f} ms in a step of "
            f"{statistics.median(times) * 1e3:.0f} ms: {statistics.median(shares):+.2%} "
            f"[{min(shares):+.2%}, {max(shares):+.2%}] (at most +1 %)",
            flush=True,
        )


def operator() -> None:
    torch.manual_seed(0)
    for channels, size in ((64, 32), (256, 16), (512, 8)):
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        x = torch.randn(1, channels, size, size)
        regularizer = ready(layer, map="operator", input_size=(size, size))
        bundle = regularizer._bundles[0][0]

        @torch.no_grad()
        def forward(layer: nn.Module = layer, x: Tensor = x) -> None:
            layer(x)

        step = partial(bundle.triplets.advance, [layer.weight.detach()], 2)
        compare(f"operator {channels} × {size}²: power step / forward", step, forward, 60, "at most 3")
        compare(f"operator {channels} × {size}²: with gradient", regularizer.add_gradient, forward, 60, "no limit set")


ROWS = {"large": large, "small": small, "mlp": mlp, "operator": operator, "networks": networks}

if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.machine()}; ours, other, paired")
    for row in sys.argv[1:] or ROWS:
        ROWS[row]()

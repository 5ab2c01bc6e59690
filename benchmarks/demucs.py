"""The penalty of Demucs, 1e-5·Σσ², by `torch.svd_lowrank` (dim 50, niters 4; and dim 1, niters 2) and by ours.

The weights have the shapes of a branch of Hybrid Demucs with its 48 channels and growth 2, of the first five of its six
levels (Défossez 2021): kernels of 0.1 MB and more, as outputs × (inputs · kernel), and its LSTMs' matrices as a whole.
Demucs begins anew at every step, with vectors from the global generator, and differentiates through the decomposition;
ours goes on from the vectors of the step before. Errors are of Σσ² beside ARPACK's in float64, of weights as torch
initializes them, which do not move.
"""

from collections.abc import Callable, Iterator

import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from benchmarks.harness import Call, Row, in_turn, ratio, record
from spectreg import SpectralNormRegularizer

NAME = "penalty of Demucs"
SECONDS = 24
STRENGTH = 1e-5
ROUNDS = 3
STEPS = 50


def layers(depth: int, channels: int) -> Iterator[nn.Module]:
    """What of Demucs has weights, in the order of its levels."""
    inputs = 2
    for level in range(depth):
        hidden, outputs = channels // 4, inputs if level else 8
        yield nn.Conv1d(inputs, channels, 8)
        for _ in range(2):
            yield nn.Conv1d(channels, hidden, 3)
            if level >= 4:
                yield from (nn.LSTM(hidden, hidden, 2, bidirectional=True), nn.Linear(2 * hidden, hidden))
                yield from (nn.Conv1d(hidden, hidden, 1) for _ in range(4))
            yield nn.Conv1d(hidden, 2 * channels, 1)
        yield nn.Conv1d(channels, 2 * channels, 1)
        yield nn.Conv1d(channels, 2 * channels, 3)
        yield nn.ConvTranspose1d(channels, outputs, 8)
        inputs, channels = channels, 2 * channels


def large(name: str, weight: Tensor) -> bool:
    return weight.numel() >= 0.1 * 2**18


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights as Demucs lays them out."""
    return [
        (p.transpose(0, 1) if isinstance(module, nn.ConvTranspose1d) else p).flatten(1)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim > 1 and large(name, p)
    ]


def by_svd_lowrank(model: nn.Module, dim: int, niters: int) -> Callable[[], Tensor]:
    return lambda: sum((torch.svd_lowrank(W, dim, niters)[1][0].square() for W in matrices(model)), torch.zeros(()))


def by_ours(model: nn.Module, **settings: int) -> SpectralNormRegularizer:
    return SpectralNormRegularizer(model, 2 * STRENGTH, map="joint", select=large, **settings)


def squares(model: nn.Module) -> float:
    """Σσ² by ARPACK."""
    arrays = [W.detach().double().numpy() for W in matrices(model)]
    return sum(float(svds(W, k=1, return_singular_vectors=False, random_state=0)[0]) ** 2 for W in arrays)


def error(value: float, truth: float) -> float:
    return value / truth - 1


def measure(depth: int, channels: int, rounds: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*layers(depth, channels))
    millions = sum(W.numel() for W in matrices(model)) / 1e6
    case = f"{len(matrices(model))} weights of Demucs, {millions:.0f} M parameters"
    one, eight = by_ours(model), by_ours(model, tracked=8)
    ways = {name: by_svd_lowrank(model, *sizes) for name, sizes in LOWRANK.items()}
    calls: dict[str, Call] = {name: lambda way=way: (STRENGTH * way()).backward() for name, way in ways.items()}
    calls |= {"penalty()": lambda: one.penalty().backward(), "add_gradient": one.add_gradient}
    calls |= {"tracked=8": eight.add_gradient}
    times = in_turn(calls, rounds, 1)
    truth = squares(model)
    errors = {name: error(way().item(), truth) for name, way in ways.items()}
    with torch.no_grad():
        for name, ours in {"penalty()": by_ours(model), "tracked=8": by_ours(model, tracked=8)}.items():
            first = error(ours.penalty().item() / STRENGTH, truth)
            for _ in range(STEPS):
                ours.add_gradient()
            errors[name] = error(ours.penalty().item() / STRENGTH, truth)
            note = f"after {STEPS} steps; {first:+.1e} after the warm-up"
            record(Row(NAME, case, name, "truth", "relative error of Σσ²", errors[name], note=note))
    for name in LOWRANK:
        record(Row(NAME, case, name, "truth", "relative error of Σσ²", errors[name], note="at every step"))
        for ours in ("penalty()", "add_gradient", "tracked=8"):
            record(ratio(NAME, case, ours, name, times))


LOWRANK = {"svd_lowrank, dim 50": (50, 4), "svd_lowrank, dim 1": (1, 2)}


def main() -> None:
    measure(5, 48, ROUNDS)

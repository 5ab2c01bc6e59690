"""The penalty of Demucs, 1e-5·Σσ², by `torch.svd_lowrank` (dim 50, niters 4; and dim 1, niters 2) and by ours.

The weights have the shapes of a branch of Hybrid Demucs with its 48 channels and growth 2, of the first five of its six
levels (Défossez 2021): kernels of 0.1 MB and more, as outputs × (inputs · kernel), and its LSTMs' matrices as a whole.
Demucs begins anew at every step, with vectors from the global generator, and differentiates through the decomposition;
ours goes on from the vectors of the step before. Errors are of Σσ² beside ARPACK's in float64, of weights as torch
initializes them, which do not move.
"""

from collections.abc import Iterator

import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from benchmarks.harness import Call, Row, compare, record
from spectreg import SpectralNormRegularizer

NAME = "penalty of Demucs"
STRENGTH = 1e-5
STEPS = 50
LOWRANK = {"svd_lowrank, dim 50": (50, 4), "svd_lowrank, dim 1": (1, 2)}


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


def main(depth: int = 5, channels: int = 48) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*layers(depth, channels))
    weights = [W.detach() for W in matrices(model)]
    case = f"{len(weights)} weights of Demucs, {sum(W.numel() for W in weights) / 1e6:.0f} M parameters"
    arrays = [W.double().numpy() for W in weights]
    truth = sum(float(svds(W, k=1, return_singular_vectors=False, random_state=0)[0]) ** 2 for W in arrays)

    def by_ours(**settings: int) -> SpectralNormRegularizer:
        return SpectralNormRegularizer(model, 2 * STRENGTH, map="joint", select=large, **settings)

    def by_svd_lowrank(dim: int, niters: int) -> Tensor:
        return sum((torch.svd_lowrank(W, dim, niters)[1][0].square() for W in matrices(model)), torch.zeros(()))

    def tell(name: str, squares: float, note: str) -> None:
        record(Row(NAME, case, name, "truth", "relative error of Σσ²", squares / truth - 1, note=note))

    for name, sizes in LOWRANK.items():
        tell(name, by_svd_lowrank(*sizes).item(), "at every step")
    one, eight = by_ours(), by_ours(tracked=8)
    for name, ours in {"penalty()": one, "tracked=8": eight}.items():
        tell(name, ours.penalty().item() / STRENGTH, "after the warm-up")
        for _ in range(STEPS):
            ours.add_gradient()
        tell(name, ours.penalty().item() / STRENGTH, f"after {STEPS} steps")
    calls: dict[str, Call] = {n: lambda s=s: (STRENGTH * by_svd_lowrank(*s)).backward() for n, s in LOWRANK.items()}
    calls |= {"penalty()": lambda: one.penalty().backward(), "add_gradient": one.add_gradient}
    calls |= {"tracked=8": eight.add_gradient}
    rows = [(ours, name, {}) for name in LOWRANK for ours in ("penalty()", "add_gradient", "tracked=8")]
    compare(NAME, case, calls, rows, rounds=3, warmup=1)

"""The norm of a convolution of 3 × 3 with zero padding, at 16 to 512 channels: time against error, for every way to it.

Orthogonium's own power iteration is for a kernel taken as a matrix; that of the convolution itself is written in torch
calls. The truth is SciPy's `eigsh` on AᵀA in float64. Errors below zero are of estimates from below, errors above zero
of upper bounds. *Warm* is one power step from vectors that have followed the weight, as in training; *cold* has
none; *certified* adds an upper bound that holds. FFT with SVD treats the image as a circle, exactly its own size or
padded; at equal error the fastest of ours that is at least as near to the truth is set against the nearer of the two.
"""

from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import spectreg
from benchmarks.harness import ROUNDS, Call, Row, Times, compare, first, in_turn, ratio, record, spread
from spectreg import SpectralNormRegularizer

NAME = "norm of a convolution"
# Channels, the side of the image, and the iterations of Gram that take no more than 0.1 Tflop: each doubles the kernel.
SIZES = ((16, 32, 4), (64, 32, 3), (128, 16, 3), (256, 8, 2), (512, 4, 1))
WHY = (
    "Kernels drawn at random have many singular values close to the largest: without vectors from the step before it "
    "takes many products with the convolution and its transpose to tell them apart, where FFT and SVD do not care."
)
WHY_ROUGH = (
    "A bound this rough is had from a few products of small kernels; ours aims nearer from its first product on."
)
WHY_PASS = "Of a small convolution the pass takes less time than the dozen calls that normalise two vectors."


def layer_of(channels: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


@torch.no_grad()
def truth(layer: nn.Conv2d, size: int) -> float:
    from scipy.sparse.linalg import LinearOperator, eigsh

    weight, n = layer.weight.double(), layer.in_channels * size**2

    def product(v: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(v.reshape(1, -1, size, size))
        return F.conv_transpose2d(F.conv2d(x, weight, padding=1), weight, padding=1).numpy().ravel()

    start = np.random.default_rng(0).standard_normal(n)
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)  # type: ignore[call-arg]
    return float(eigsh(operator, k=1, v0=start, tol=1e-7, return_eigenvectors=False)[0] ** 0.5)


def fourier(layer: nn.Conv2d, size: int) -> float:
    """The largest singular value of the circular convolution (Sedghi et al. 2019): FFT of the kernel, then SVDs.

    On a circle of 2 pixels more it is an upper bound of the zero-padded convolution, which is a part of that.
    """
    kernel = layer.weight.detach().permute(2, 3, 0, 1).numpy()
    return float(np.linalg.svd(np.fft.fft2(kernel, (size, size), axes=(0, 1)), compute_uv=False).max())


def gram(layer: nn.Conv2d, iterations: int) -> float:
    """Gram iteration for zero padding (Delattre et al. 2024), as orthogonium has it: an upper bound."""
    from orthogonium.layers.conv.singular_values.delattre24 import compute_delattre2024

    return float(compute_delattre2024(layer.weight.detach(), n_iter=iterations))


@torch.no_grad()
def power(layer: nn.Conv2d, size: int, iterations: int) -> float:
    """Power iteration on the zero-padded convolution in bare torch calls, from a cold start."""
    torch.manual_seed(1)
    v = torch.randn(1, layer.in_channels, size, size)
    for _ in range(iterations):
        u = F.conv2d(v / v.norm(), layer.weight, padding=1)
        v = F.conv_transpose2d(u / u.norm(), layer.weight, padding=1)
    return float(v.norm())


def warm(layer: nn.Conv2d, size: int) -> Call:
    """σ as the regularizer keeps it in training: one power step from vectors that follow the weight."""
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.sub_(torch.randn_like(layer.weight), alpha=1e-3 * float(layer.weight.std()))
    regularizer = SpectralNormRegularizer(layer, 1e-9, map="operator", input_size=(size, size), warmup=400)
    regularizer.sigma()
    with torch.no_grad():
        layer.weight.copy_(before)
    ((group, _),) = regularizer._state.arrange()

    @torch.no_grad()
    def call() -> float:
        group.vectors.advance([layer.weight.detach()], 2)
        return float(group.vectors.sigma)

    return call


def methods(layer: nn.Conv2d, size: int, iterations: int) -> dict[str, Call]:
    shape = layer.in_channels, size, size
    found: dict[str, Call] = {"spectreg, warm": warm(layer, size)}
    for t in (0.2, 0.05, 0.02, 0.01, 5e-3):
        cold = partial(spectreg.operator_norm, layer, shape, tolerance=t, max_products=400)
        found[f"spectreg, cold, tolerance {t:g}"] = lambda cold=cold: cold().value
    found["spectreg, certified"] = lambda: spectreg.operator_norm(layer, shape, tight=True).upper
    found["FFT and SVD, circular"] = partial(fourier, layer, size)
    found["FFT and SVD, padded"] = partial(fourier, layer, size + 2)
    for n in (10, 100):
        found[f"power iteration, {n} steps in torch calls"] = partial(power, layer, size, n)
    for n in range(1, iterations + 1):
        found[f"Gram iteration of orthogonium, {n}"] = partial(gram, layer, n)
    return found


def at_equal_error(case: str, times: Times, errors: dict[str, float]) -> None:
    """The peer's variant that is nearest to the truth, and the fastest of ours that is at least as near."""
    for peer in ("FFT and SVD", "Gram iteration", "power iteration"):
        theirs = min((n for n in errors if n.startswith(peer)), key=lambda n: abs(errors[n]), default=None)
        for kind in ("warm", "cold") if theirs else ():
            enough = max(abs(errors[theirs]), 1e-4)
            ours = [n for n in errors if n.startswith(f"spectreg, {kind}") and abs(errors[n]) <= enough]
            if not ours:
                record(Row(NAME, case, f"spectreg, {kind}", peer, "×", note="none of ours is as near to the truth"))
                continue
            best = min(ours, key=lambda n: sum(times[n]))
            note = f"errors {errors[best]:+.1e} and {errors[theirs]:+.1e}"
            if peer == "FFT and SVD":
                record(ratio(NAME, case, theirs, best, times, at_least=20, note=note, why=WHY))
            else:
                record(ratio(NAME, case, best, theirs, times, note=note, why=WHY_ROUGH))


def main() -> None:
    for channels, size, iterations in SIZES:
        layer, case = layer_of(channels), f"{channels} → {channels} on {size}²"
        exact, calls = truth(layer, size), methods(layer, size, iterations)
        errors = {name: found / exact - 1 for name, found in first(NAME, case, calls).items()}
        times = in_turn({name: calls[name] for name in errors}, warmup=1)
        for name, taken in times.items():
            record(spread(NAME, case, name, "truth", "ms", [1e3 * t for t in taken], error=errors[name]))
        at_equal_error(f"{case}, at equal error", times, errors)
        x = torch.randn(1, channels, size, size)
        passes = {"spectreg, warm": warm(layer, size), "a forward pass": torch.no_grad()(lambda: layer(x))}  # noqa: B023
        rows = [("spectreg, warm", "a forward pass", {"at_most": 3.0, "why": WHY_PASS})]
        compare(NAME, case, passes, rows, rounds=4 * ROUNDS)

"""The norm of a convolution of 3 × 3 with zero padding, at 16 to 512 channels: time against error, for every way to it.

Orthogonium's own power iteration is for a kernel taken as a matrix; that of the convolution itself is written in torch
calls. The truth is SciPy's `eigsh` on AᵀA in float64. Errors below zero are of estimates from below, errors above zero
of upper bounds. *Warm* is one power step from vectors that have followed the weight, as in training; *cold* has
none; *certified* adds an upper bound that holds. FFT with SVD treats the image as a circle, exactly its own size or
padded; at equal error the fastest of ours that is at least as near to the truth is set against the nearer of the two.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import spectreg
from benchmarks.harness import ROUNDS, Row, failed, in_turn, ratio, record, spread
from spectreg import SpectralNormRegularizer

NAME = "norm of a convolution"
SECONDS = 220
SIZES = {16: 32, 64: 32, 128: 16, 256: 8, 512: 4}
FFT = "FFT and SVD"
WHY = (
    "Kernels drawn at random have many singular values close to the largest: without vectors from the step before it "
    "takes many products with the convolution and its transpose to tell them apart, where FFT and SVD do not care."
)
WHY_ROUGH = (
    "A bound this rough is had from a few products of small kernels; ours aims nearer from its first product on."
)

WHY_PASS = "Of a small convolution the pass takes less time than the dozen calls that normalise two vectors."


def layer_of(channels: int, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return layer.to(dtype)


@torch.no_grad()
def truth(channels: int, size: int) -> float:
    from scipy.sparse.linalg import LinearOperator, eigsh

    weight, n = layer_of(channels, torch.float64).weight, channels * size**2

    def product(v: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(v.reshape(1, channels, size, size))
        return F.conv_transpose2d(F.conv2d(x, weight, padding=1), weight, padding=1).numpy().ravel()

    start = np.random.default_rng(0).standard_normal(n)
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)  # type: ignore[call-arg]
    return float(eigsh(operator, k=1, v0=start, tol=1e-7, return_eigenvectors=False)[0] ** 0.5)


def fourier(layer: nn.Conv2d, size: int) -> float:
    """The largest singular value of the circular convolution (Sedghi et al. 2019): FFT of the kernel, then SVDs."""
    kernel = layer.weight.detach().permute(2, 3, 0, 1).numpy()
    return float(np.linalg.svd(np.fft.fft2(kernel, (size, size), axes=(0, 1)), compute_uv=False).max())


def fourier_of_the_padded(layer: nn.Conv2d, size: int) -> float:
    """The same on the circle that the zero-padded convolution is a part of: an upper bound."""
    return fourier(layer, size + 2)


def gram(layer: nn.Conv2d, iterations: int) -> float:
    """Gram iteration for zero padding (Delattre et al. 2024), as orthogonium has it: an upper bound.

    Each iteration doubles the kernel: 17 × 17 taps after four. What needs above 0.1 Tflop is left out.
    """
    taps = 2**iterations
    work = 2 * layer.in_channels**3 * (taps + 1) ** 2 * (2 * taps + 1) ** 2
    if work > 1e11:
        raise RuntimeError(f"left out: {work / 1e12:.1f} Tflop for the last iteration, on a kernel of {taps + 1}² taps")
    from orthogonium.layers.conv.singular_values.delattre24 import compute_delattre2024

    return float(compute_delattre2024(layer.weight.detach(), n_iter=iterations))


@torch.no_grad()
def power(layer: nn.Conv2d, size: int, iterations: int) -> float:
    """Power iteration on the zero-padded convolution in bare torch calls, from a cold start."""
    torch.manual_seed(1)
    v = torch.randn(1, layer.in_channels, size, size)
    for _ in range(iterations):
        u = nn.functional.conv2d(v / v.norm(), layer.weight, padding=1)
        v = nn.functional.conv_transpose2d(u / u.norm(), layer.weight, padding=1)
    return float(v.norm())


def warm(layer: nn.Conv2d, size: int) -> Callable[[], float]:
    """σ as the regularizer keeps it in training: one power step from vectors that follow the weight."""
    regularizer = SpectralNormRegularizer(layer, 1e-9, map="operator", input_size=(size, size), warmup=400)
    regularizer.sigma()
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight), alpha=1e-3 * float(layer.weight.std()))

    ((group, _),) = regularizer._state.arrange()

    @torch.no_grad()
    def call() -> float:
        group.vectors.advance([layer.weight.detach()], 2)
        return float(group.vectors.sigma)

    return call


def methods(layer: nn.Conv2d, size: int) -> dict[str, Callable[[], float]]:
    shape = (layer.in_channels, size, size)
    found: dict[str, Callable[[], float]] = {"spectreg, warm": warm(layer, size)}
    for tolerance in (0.2, 0.05, 0.02, 0.01, 5e-3):
        found[f"spectreg, cold, tolerance {tolerance:g}"] = lambda t=tolerance: (
            spectreg.operator_norm(layer, shape, tolerance=t, max_products=400).value
        )
    found["spectreg, certified"] = lambda: spectreg.operator_norm(layer, shape, tight=True).upper
    found[f"{FFT}, circular"] = lambda: fourier(layer, size)
    found[f"{FFT}, padded"] = lambda: fourier_of_the_padded(layer, size)
    for n in (10, 100):
        found[f"power iteration, {n} steps in torch calls"] = lambda n=n: power(layer, size, n)
    for n in (1, 2, 3, 4):
        found[f"Gram iteration of orthogonium, {n}"] = lambda n=n: gram(layer, n)
    return found


def main() -> None:
    for channels, size in SIZES.items():
        layer, case, exact = layer_of(channels), f"{channels} → {channels} on {size}²", truth(channels, size)
        calls, errors = methods(layer, size), {}
        with torch.no_grad():
            layer.weight.copy_(layer_of(channels).weight)  # as it was before the vectors had to follow it
        for name, call in list(calls.items()):
            try:
                errors[name] = call() / exact - 1
            except Exception as error:
                record(failed(NAME, case, name, "truth", error))
                del calls[name]
        times = in_turn(calls, warmup=1)
        for name in calls:
            record(spread(NAME, case, name, "truth", "ms", [1e3 * t for t in times[name]], error=errors[name]))
        compare(f"{case}, at equal error", times, errors)
        beside_a_forward_pass(case, layer, size)


def beside_a_forward_pass(case: str, layer: nn.Conv2d, size: int) -> None:
    """A warm step, which takes the convolution and its transpose once, over the layer's own pass on one image."""
    x, step = torch.randn(1, layer.in_channels, size, size), warm(layer, size)

    @torch.no_grad()
    def forward() -> None:
        layer(x)

    times = in_turn({"spectreg, warm": step, "a forward pass": forward}, 4 * ROUNDS)
    goal = "norm of a convolution: a warm step within 3 × a forward pass on one image"
    record(ratio(NAME, case, "spectreg, warm", "a forward pass", times, at_most=3, goal=goal, why=WHY_PASS))


def compare(case: str, times: dict[str, list[float]], errors: dict[str, float]) -> None:
    """The peer's variant that is nearest to the truth, and the fastest of ours that is at least as near."""
    for peer in (FFT, "Gram iteration", "power iteration"):
        named = [n for n in errors if n.startswith(peer)]
        if not named:
            continue
        theirs = min(named, key=lambda n: abs(errors[n]))
        enough = max(abs(errors[theirs]), 1e-4)
        for kind in ("warm", "cold"):
            ours = [n for n in errors if n.startswith(f"spectreg, {kind}") and abs(errors[n]) <= enough]
            if not ours:
                record(Row(NAME, case, f"spectreg, {kind}", peer, "×", note="none of ours is as near to the truth"))
                continue
            best = min(ours, key=lambda n: sum(times[n]))
            note = f"errors {errors[best]:+.1e} and {errors[theirs]:+.1e}"
            if peer == FFT:
                goal = f"norm of a convolution, {kind}: at equal error at least 20 × faster than FFT and SVD"
                record(ratio(NAME, case, theirs, best, times, at_least=20, goal=goal, note=note, why=WHY))
            else:
                record(ratio(NAME, case, best, theirs, times, note=note, why=WHY_ROUGH))

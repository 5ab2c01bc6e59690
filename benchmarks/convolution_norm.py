"""The norm of a convolution: time against error, for every way to have it."""

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import spectreg
from benchmarks.harness import ROUNDS, Row, failed, in_turn, ratio, record
from spectreg import SpectralNormRegularizer

NAME = "norm of a convolution"
SIZES = {16: 32, 64: 32, 128: 16, 256: 8, 512: 4}


def layer_of(channels: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


def fourier(layer: nn.Conv2d, size: int) -> float:
    """The largest singular value of the circular convolution (Sedghi et al. 2019): FFT of the kernel, then SVDs."""
    kernel = layer.weight.detach().permute(2, 3, 0, 1).numpy()
    return float(np.linalg.svd(np.fft.fft2(kernel, (size, size), axes=(0, 1)), compute_uv=False).max())


def fourier_of_the_padded(layer: nn.Conv2d, size: int) -> float:
    """The same on the circle that the zero-padded convolution is a part of: an upper bound."""
    return fourier(layer, size + 2)


def gram(layer: nn.Conv2d, iterations: int) -> float:
    """Gram iteration for zero padding (Delattre et al. 2024), as orthogonium has it: an upper bound.

    Each iteration doubles the kernel: 33 × 33 taps after four. What needs above 0.3 Tflop is left out.
    """
    taps = 2**iterations
    work = 2 * layer.in_channels**3 * (taps + 1) ** 2 * (2 * taps + 1) ** 2
    if work > 3e11:
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
    bundle = regularizer._bundles[0][0]

    @torch.no_grad()
    def call() -> float:
        bundle.triplets.advance([layer.weight.detach()], 2)
        return float(bundle.triplets.sigma)

    return call


def methods(layer: nn.Conv2d, size: int) -> dict[str, Callable[[], float]]:
    shape = (layer.in_channels, size, size)
    found: dict[str, Callable[[], float]] = {"spectreg, warm": warm(layer, size)}
    for tolerance in (0.2, 0.05, 0.02, 0.01, 5e-3):
        found[f"spectreg, cold, tolerance {tolerance:g}"] = lambda t=tolerance: (
            spectreg.operator_norm(layer, shape, tolerance=t, max_products=400).value
        )
    found["spectreg, certified"] = lambda: spectreg.operator_norm(layer, shape, tight=True).upper
    found["FFT and SVD, circular"] = lambda: fourier(layer, size)
    found["FFT and SVD, padded"] = lambda: fourier_of_the_padded(layer, size)
    for n in (10, 100):
        found[f"power iteration in torch calls, {n}"] = lambda n=n: power(layer, size, n)
    for n in (2, 4):
        found[f"Gram iteration (orthogonium), {n}"] = lambda n=n: gram(layer, n)
    return found


def main() -> None:
    for channels, size in SIZES.items():
        layer, case = layer_of(channels), f"{channels} → {channels}, 3×3 on {size}²"
        calls = methods(layer, size)
        exact = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=torch.float64)
        exact.weight.data.copy_(layer.weight)
        truth = spectreg.operator_norm(exact, (channels, size, size), tolerance=1e-4, max_products=1000)
        errors, times = {}, {}
        for name, call in list(calls.items()):
            try:
                errors[name] = call() / truth.value - 1
            except Exception as error:
                record(failed(NAME, case, name, "truth", error))
                del calls[name]
        slow = {n for n in calls if n.startswith("FFT") or "Gram" in n or "certified" in n} if channels >= 64 else set()
        times = in_turn({n: c for n, c in calls.items() if n not in slow}, ROUNDS, 1)
        times |= in_turn({n: calls[n] for n in slow}, 3, 0)
        for name in calls:
            record(Row(NAME, case, name, "truth", "ms", statistics.median(times[name]) * 1e3, rounds=len(times[name]),
                       seconds=statistics.median(times[name]), error=errors[name]))  # fmt: skip
        compare(case, times, errors)


def compare(case: str, times: dict[str, list[float]], errors: dict[str, float]) -> None:
    """FFT and SVD over the fastest of ours that is at least as near to the truth."""
    fft = min((n for n in errors if n.startswith("FFT")), key=lambda n: abs(errors[n]))
    for kind in ("warm", "cold"):
        ours = [
            n for n in errors if n.startswith(f"spectreg, {kind}") and abs(errors[n]) <= max(abs(errors[fft]), 1e-4)
        ]
        if not ours:
            continue
        best = min(ours, key=lambda n: statistics.median(times[n]))
        rounds = min(len(times[fft]), len(times[best]))
        pairs = {n: times[n][:rounds] for n in (fft, best)}
        note = f"errors {errors[fft]:+.1e} and {errors[best]:+.1e}"
        record(ratio(NAME, f"{case}, at equal error", fft, best, pairs, at_least=20, note=note))

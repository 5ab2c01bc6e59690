"""Cost of the measures beside their peers, in one run.

    OMP_NUM_THREADS=1 python benchmarks/measures.py [--repeats N] [spectra norm hessian jacobian]

Each row runs A B A B …, and gives the median of the paired ratios peer/ours with its quartiles, and the errors of both
against float64 truth. Needs `pip install --no-deps pyhessian` beside the dev extra for the Hessian's second peer.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import spectreg
from spectreg_lab.config import VGG
from spectreg_lab.models.vgg import vgg

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)


def row(name: str, ours: Callable[[], object], peer: Callable[[], object], repeats: int, target: float) -> None:
    """One line: seconds of both, and how many times faster ours is."""
    ours(), peer()
    ratios, seconds = [], ([], [])
    for _ in range(repeats):
        pair = [elapsed(ours), elapsed(peer)]
        ratios.append(pair[1] / pair[0])
        for kept, value in zip(seconds, pair, strict=True):
            kept.append(value)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    ours_ms, peer_ms = (1e3 * np.median(kept) for kept in seconds)
    print(
        f"{name}: ours {ours_ms:.1f} ms, peer {peer_ms:.1f} ms, {middle:.2f} × [{low:.2f}, {high:.2f}] (n={repeats}, "
        f"target {target:g} ×)",
        flush=True,
    )


def elapsed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def spectra(repeats: int) -> None:
    torch.manual_seed(0)
    model = vgg(VGG(width=64, stages=(2, 2, 3, 3, 3), hidden=512, batch_norm=True), (3, 32, 32), 10)
    weights = {name: p.detach().flatten(1).numpy() for name, p in model.named_parameters() if p.ndim >= 2}

    def peer():
        return {name: np.linalg.svd(W, compute_uv=False) for name, W in weights.items()}

    ours, theirs = spectreg.singular_values(model), peer()
    for label, found in (("ours", {n: s.values[0].numpy() for n, s in ours.items()}), ("NumPy", theirs)):
        truth = {name: np.linalg.svd(W.astype(np.float64), compute_uv=False) for name, W in weights.items()}
        first = max(abs(found[n][0] / S[0] - 1) for n, S in truth.items())
        rest = max(np.abs(found[n] - S).max() / S[0] for n, S in truth.items())
        print(f"  {label}: largest error of σ₁ {first:.1e} relative, of the rest {rest:.1e} of σ₁")
    row("spectra of VGG-16 beside NumPy's SVD", lambda: spectreg.singular_values(model), peer, repeats, 3)


def norm(repeats: int) -> None:
    for label, layer in (("Gaussian kernel", gaussian_layer()), ("smooth kernel of low rank", smooth_layer())):
        kernel = layer.weight.detach().permute(2, 3, 0, 1).numpy()

        def peer(kernel=kernel):
            """The singular values of the circular convolution, as published with arXiv:1805.10408."""
            return np.linalg.svd(np.fft.fft2(kernel, (32, 32), axes=(0, 1)), compute_uv=False).max()

        def ours(layer=layer):
            return spectreg.operator_norm(layer, (64, 32, 32))

        exact = nn.Conv2d(64, 64, 3, padding=1, bias=False, dtype=torch.float64)
        exact.weight.data.copy_(layer.weight)
        truth = spectreg.operator_norm(exact, (64, 32, 32), tolerance=1e-7, max_products=3000)
        found = ours()
        print(
            f"  {label}: truth {truth.value:.5f} (residual {truth.residual:.0e}); "
            f"ours {found.value / truth.value - 1:+.1e} in {found.products} products, "
            f"bound × {found.upper / truth.value:.3f}; FFT and SVD (circular) {peer() / truth.value - 1:+.1e}"
        )
        row(f"norm of a 64→64 3×3 convolution on 32×32, {label}, beside FFT and SVD", ours, peer, repeats, 20)


def gaussian_layer() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(64, 64, 3, padding=1, bias=False)


def smooth_layer() -> nn.Conv2d:
    layer = gaussian_layer()
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([[0.5, 1.0, 0.5], [1.0, 2.0, 1.0], [0.5, 1.0, 0.5]]))
        U, S, V = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
        layer.weight.copy_((U * S * torch.linspace(1, 0.05, 64) ** 2 @ V).view_as(layer.weight))
    return layer


def hessian(repeats: int) -> None:
    from curvlinops import HessianLinearOperator
    from pyhessian import hessian as peer_hessian
    from scipy.sparse.linalg import eigsh
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:512, None] / 8 - 1, dtype=torch.float32)
    y = torch.tensor(digits.target[:512])
    torch.manual_seed(0)
    model = vgg(VGG(width=16, stages=(2, 2), hidden=64, batch_norm=True), (1, 8, 8), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    criterion, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    count = [0]

    def curvlinops(tolerance=1e-3):
        operator = HessianLinearOperator(model, criterion, parameters, [(x, y)], check_deterministic=False).to_scipy()
        product = operator._matvec
        count[0] = 0

        def counted(v):
            count[0] += 1
            return product(v)

        operator._matvec = counted
        start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype)
        return eigsh(operator, k=1, which="LA", tol=tolerance, v0=start)

    def ours(tolerance=1e-3):
        return spectreg.hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)], tolerance=tolerance)

    def power():
        torch.manual_seed(0)
        return peer_hessian(model, criterion, data=(x, y), cuda=False).eigenvalues(maxIter=300, tol=1e-5, top_n=1)

    truth = float(curvlinops(1e-6)[0][0])
    found, theirs = ours(), curvlinops()
    print(
        f"  ours {found.values[0] / truth - 1:+.1e} in {found.products} products; "
        f"eigsh {theirs[0][0] / truth - 1:+.1e} in {count[0]} products"
    )
    row("top Hessian eigenvalue to 1e-3 beside curvlinops with eigsh", ours, curvlinops, repeats, 1)

    values, (vectors,) = power()
    v = torch.cat([part.flatten() for part in vectors])
    Hv = HessianLinearOperator(model, criterion, parameters, [(x, y)], check_deterministic=False) @ v
    residual = float((Hv - (v @ Hv) * v).norm() / (v @ Hv))
    found = ours(residual)
    print(
        f"  PyHessian {values[0] / truth - 1:+.1e} with residual {residual:.1e}; ours at that residual "
        f"{found.values[0] / truth - 1:+.1e}, residual {found.residuals[0] / found.values[0]:.1e}, "
        f"{found.products} products"
    )
    row("top Hessian eigenvalue beside PyHessian at its residual", lambda: ours(residual), power, repeats, 1)


def jacobian(repeats: int) -> None:
    torch.manual_seed(0)
    model = vgg(VGG(width=32, stages=(2, 2, 3, 3, 3), hidden=512, batch_norm=True), (3, 32, 32), 10).eval()
    x, y, iterations = torch.randn(64, 3, 32, 32), torch.randint(10, (64,)), 6

    def ours(**options):
        return spectreg.jacobian_norm(model, x, tolerance=1e-12, max_iterations=iterations, **options)

    def pairs():
        for _ in range(iterations):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

    exact = spectreg.jacobian_norm(model, x).value
    long = spectreg.jacobian_norm(model, x, exact=False, tolerance=1e-3, max_iterations=300)
    print(
        f"  power iteration to 1e-3: {long.iterations} iterations, {int(long.converged.sum())} of 64 converged, "
        f"largest error {(long.value / exact - 1).abs().max():.1e}"
    )
    row("Jacobian norm of 64 beside as many forward-backward pairs", lambda: ours(exact=False), pairs, repeats, 0.4)


ROWS = {"spectra": spectra, "norm": norm, "hessian": hessian, "jacobian": jacobian}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), metavar="ROW")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, {THREADS} threads, load {os.getloadavg()}")
    for name in options.rows:
        ROWS[name](options.repeats)

"""Spectra, Hessian and Jacobian norm beside the tools that one would take instead.

Spectra are those of VGG-16 as the paper has it, 15 M parameters in 15 weights; Hessian and Jacobian those of a small
VGG trained on the digits. Before anything is timed, both sides are held against a third that is exact, or against the
same equation solved further.
"""

import contextlib
import io
import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import spectreg
from benchmarks.harness import Call, compare, failed, lazily, record
from spectreg_lab.models.vgg import vgg
from spectreg_lab.settings.config import VGG

NAME = "measures"


def beside(case: str, peer: str, ours: Call, theirs: Call, error: float | None, **more: object) -> None:
    """A row of ours over ``theirs``; ``error`` is how far their results lie apart, or ours from the truth."""
    if error is not None and not error < 1e-3:
        raise AssertionError(f"{case}, {peer}: the results differ by {error:.1e} relative.")
    calls = {"spectreg": ours, peer: theirs}
    compare(NAME, case, calls, [("spectreg", peer, {"error": error, **more})], warmup=1)


def spectra() -> None:
    torch.manual_seed(0)
    model = vgg(VGG(), (3, 32, 32), 10)
    weights = {n: p.detach().flatten(1).numpy() for n, p in model.named_parameters() if p.ndim >= 2}
    truth = {n: np.linalg.svd(W.astype(np.float64), compute_uv=False) for n, W in weights.items()}

    def numpy() -> dict[str, np.ndarray]:
        return {n: np.linalg.svd(W, compute_uv=False) for n, W in weights.items()}

    def watched() -> Call:
        import weightwatcher

        logging.disable(logging.WARNING)
        watcher = weightwatcher.WeightWatcher(model=model)
        return partial(watcher.analyze, plot=False, randomize=False, mp_fit=False)

    def quietly(call: Call) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call()

    ours = partial(spectreg.singular_values, model)
    both = {n: s.values[0].numpy() for n, s in ours().items()}, numpy()
    errors = [max(np.abs(found[n] - S).max() / S[0] for n, S in truth.items()) for found in both]
    case, note = "all singular values of VGG-16", f"NumPy's error {errors[1]:.0e} of σ₁; ours are in float64"
    beside(case, "NumPy", ours, numpy, errors[0], at_most=1 / 3, note=note)
    note = "weightwatcher also fits a power law to each spectrum, and cuts a kernel into its taps"
    beside(case, "weightwatcher", ours, partial(quietly, lazily(watched)), None, note=note)


def top_values() -> None:
    from scipy.sparse.linalg import svds

    W = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    truth = np.linalg.svd(W.double().numpy(), compute_uv=False)[:4]

    def ours() -> np.ndarray:
        return spectreg.singular_values({"W": W}, top=4)["W"].values[0].numpy()

    def theirs() -> np.ndarray:
        start = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
        return np.sort(svds(W.numpy(), k=4, return_singular_vectors=False, v0=start))[::-1]

    errors = [float(np.abs(f() / truth - 1).max()) for f in (ours, theirs)]
    why = "Both are Lanczos, and ours runs to a smaller error."
    more = {"at_most": 1.0, "note": f"svds' error {errors[1]:.0e}", "why": why}
    beside("the 4 largest of a 1024 × 2048 matrix", "SciPy svds", ours, theirs, errors[0], **more)


def trained_network() -> tuple[nn.Module, Tensor, Tensor]:
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
    return model.eval(), x, y


Pair = Callable[[], tuple[float, Tensor]]


def with_curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Pair:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    data = list(model.parameters()), [(x, y)]
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), *data, check_deterministic=False)
    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)

    def call() -> tuple[float, Tensor]:
        values, vectors = eigsh(operator.to_scipy(), k=1, which="LA", tol=1e-3, v0=start)
        return float(values[0]), torch.from_numpy(vectors[:, 0].copy()).float()

    return call


def with_pyhessian(model: nn.Module, x: Tensor, y: Tensor) -> Pair:
    from pyhessian import hessian

    def call() -> tuple[float, Tensor]:
        torch.manual_seed(0)
        found = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False).eigenvalues(maxIter=300, tol=1e-5)
        return found[0][0], torch.cat([part.flatten() for part in found[1][0]])

    return call


def hessian(peer: str, prepare: Callable[[nn.Module, Tensor, Tensor], Pair]) -> None:
    """Both at the residual ‖Hv − value·v‖/value that the peer reaches, taken by two plain derivatives."""
    model, x, y = trained_network()
    theirs = prepare(model, x, y)
    value, v = theirs()
    parameters = list(model.parameters())
    first = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    second = torch.autograd.grad(torch.cat([g.flatten() for g in first]) @ v, parameters)
    residual = float((torch.cat([g.flatten() for g in second]) - value * v).norm() / value)

    def ours(tolerance: float = residual) -> float:
        return spectreg.hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)], tolerance=tolerance).values[0]

    off = [abs(found / ours(1e-6) - 1) for found in (ours(), value)]
    note = f"both at their residual of {residual:.0e}; off the value at 1e-6 by {off[0]:.0e}, theirs by {off[1]:.0e}"
    beside("top Hessian eigenvalue, digits", peer, ours, theirs, abs(ours() / value - 1), at_most=1.0, note=note)


def jacobian() -> None:
    model, x, _ = trained_network()
    x = x[:64]

    def dense() -> Tensor:
        one = torch.func.jacrev(lambda z: model(z[None])[0])
        return torch.linalg.matrix_norm(torch.func.vmap(one)(x).detach().flatten(2), 2)

    why = "Where outputs are few the formed Jacobian costs fewer passes than an iteration; the default forms it there."
    for name, exact, limit in (("formed", True, 1.0), ("power iteration to 1e-3", False, None)):
        ours = partial(spectreg.jacobian_norm, model, x, exact=exact)
        error = float((ours().value / dense() - 1).abs().max())
        case = f"Jacobian norm of 64 examples, 10 outputs, {name}"
        beside(case, "jacrev and SVD", ours, dense, error, at_most=limit, why=why)


def main() -> None:
    curvlinops = partial(hessian, "curvlinops with eigsh", with_curvlinops)
    pyhessian = partial(hessian, "PyHessian", with_pyhessian)
    parts = {"NumPy": spectra, "svds": top_values, "curvlinops": curvlinops, "PyHessian": pyhessian}
    for name, part in (parts | {"jacrev": jacobian}).items():
        try:
            part()
        except Exception as error:
            record(failed(NAME, f"beside {name}", "spectreg", error))

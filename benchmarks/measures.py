"""Spectra, Hessian and Jacobian norm beside the tools that one would take instead.

Spectra are those of VGG-16 as the paper has it, 15 M parameters in 15 weights; Hessian and Jacobian those of a small
VGG trained on the digits. Before anything is timed, both sides are held against a third that is exact, or against the
same equation solved further.
"""

import contextlib
import io
import logging

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import spectreg
from benchmarks.harness import ROUNDS, Call, failed, in_turn, ratio, record
from spectreg.eigenvalues import Eigenvalues
from spectreg_lab.config import VGG
from spectreg_lab.models.vgg import vgg

NAME = "measures"
SECONDS = 110
VALUES = "all singular values of VGG-16"


def beside(case: str, peer: str, ours: Call, theirs: Call, error: float, note: str, limit: float | None = 1.0,
           goal: str = "", why: str = "") -> None:  # fmt: skip
    times = in_turn({"spectreg": ours, peer: theirs}, ROUNDS, 1)
    record(ratio(NAME, case, "spectreg", peer, times, at_most=limit, error=error, note=note, goal=goal, why=why))


def spectra() -> None:
    torch.manual_seed(0)
    model = vgg(VGG(), (3, 32, 32), 10)
    weights = {n: p.detach().flatten(1).numpy() for n, p in model.named_parameters() if p.ndim >= 2}
    truth = {n: np.linalg.svd(W.astype(np.float64), compute_uv=False) for n, W in weights.items()}

    def numpy() -> dict[str, np.ndarray]:
        return {n: np.linalg.svd(W, compute_uv=False) for n, W in weights.items()}

    def ours() -> object:
        return spectreg.singular_values(model)

    both = {n: s.values[0].numpy() for n, s in spectreg.singular_values(model).items()}, numpy()
    errors = [max(np.abs(found[n] - S).max() / S[0] for n, S in truth.items()) for found in both]
    note = f"largest error {errors[0]:.0e} of σ₁, NumPy's {errors[1]:.0e}"
    goal = "all singular values: at most a third of NumPy's time"
    why = "Ours are in float64, NumPy's in float32."
    beside(VALUES, "NumPy", ours, numpy, errors[0], note, 1 / 3, goal, why)
    top_values()
    try:
        watched(model, ours)
    except Exception as error:
        record(failed(NAME, VALUES, "spectreg", "weightwatcher", error))


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
    note = f"relative error {errors[0]:.0e}, svds' {errors[1]:.0e}"
    why = "Both are Lanczos, and ours runs to a smaller error."
    goal = "the largest singular values: faster than SciPy's svds"
    beside("the 4 largest of a 1024 × 2048 matrix", "SciPy svds", ours, theirs, errors[0], note, 1.0, goal, why)


def watched(model: nn.Module, ours: Call) -> None:
    import weightwatcher

    logging.disable(logging.WARNING)

    def theirs() -> object:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return weightwatcher.WeightWatcher(model=model).analyze(plot=False, randomize=False, mp_fit=False)

    theirs()
    note = "weightwatcher also fits a power law to each spectrum, and cuts a kernel into its taps"
    beside(VALUES, "weightwatcher", ours, theirs, 0.0, note, None)


def trained_network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
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
    return model.eval(), x, y


def hessian() -> None:
    from curvlinops import HessianLinearOperator
    from pyhessian import hessian as peer_hessian
    from scipy.sparse.linalg import eigsh

    model, x, y = trained_network()
    loss = nn.CrossEntropyLoss()
    operator = HessianLinearOperator(model, loss, list(model.parameters()), [(x, y)], check_deterministic=False)

    def curvlinops(tolerance: float = 1e-3) -> tuple[float, torch.Tensor]:
        start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)
        values, vectors = eigsh(operator.to_scipy(), k=1, which="LA", tol=tolerance, v0=start)
        return float(values[0]), torch.from_numpy(vectors[:, 0].copy()).float()

    def power() -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        found = peer_hessian(model, loss, data=(x, y), cuda=False).eigenvalues(maxIter=300, tol=1e-5, top_n=1)
        return found[0][0], torch.cat([part.flatten() for part in found[1][0]])

    truth, _ = curvlinops(1e-6)
    goal = "top Hessian eigenvalue: faster than curvlinops and PyHessian at the same residual"
    for peer, theirs in (("curvlinops with eigsh", curvlinops), ("PyHessian", power)):
        value, v = theirs()
        residual = float((operator @ v - value * v).norm() / value)

        def ours(residual: float = residual) -> Eigenvalues:
            return spectreg.hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)], tolerance=residual)

        error = abs(ours().values[0] / truth - 1)
        note = f"error {error:.0e}, theirs {abs(value / truth - 1):.0e}, at their residual of {residual:.0e}"
        beside("top Hessian eigenvalue, digits", peer, ours, theirs, error, note, goal=goal)


def jacobian() -> None:
    model, x, _ = trained_network()
    x = x[:64]

    def dense() -> torch.Tensor:
        one = torch.func.jacrev(lambda z: model(z[None])[0])
        return torch.linalg.matrix_norm(torch.func.vmap(one)(x).detach().flatten(2), 2)

    truth = dense()
    goal = "Jacobian norm: faster than jacrev with an SVD"
    why = "Where outputs are few the formed Jacobian costs fewer passes than an iteration; the default forms it there."
    for name, exact in (("formed", True), ("power iteration to 1e-3", False)):

        def ours(exact: bool = exact) -> torch.Tensor:
            return spectreg.jacobian_norm(model, x, exact=exact).value

        error = float((ours() / truth - 1).abs().max())
        beside(f"Jacobian norm of 64 examples, 10 outputs, {name}", "jacrev and SVD", ours, dense, error,
               f"largest error {error:.0e}", 1.0 if exact else None, goal * exact, why)  # fmt: skip


def main() -> None:
    for part in (spectra, hessian, jacobian):
        try:
            part()
        except Exception as error:
            record(failed(NAME, part.__name__, "spectreg", "peers", error))

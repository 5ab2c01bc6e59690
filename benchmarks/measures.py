"""Spectra, Hessian and Jacobian norm beside the tools that one would take instead.

Spectra are those of VGG-16 as the paper has it, 15 M parameters in 15 weights; Hessian and Jacobian those of a small
VGG trained on the digits. Before anything is timed, both sides are held against a third that is exact, or against the
same equation solved further.
"""

import contextlib
import io
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import spectreg
from benchmarks.harness import ROUNDS, Call, failed, in_turn, ratio, record
from spectreg.linalg.lanczos import Eigenvalues
from spectreg_lab.models.vgg import vgg
from spectreg_lab.settings.config import VGG

NAME = "measures"
SECONDS = 145
VALUES = "all singular values of VGG-16"


def beside(case: str, peer: str, ours: Call, theirs: Call, error: float | None, note: str, limit: float | None = 1.0,
           goal: str = "", why: str = "") -> None:  # fmt: skip
    """A row of ours over ``theirs``; ``error`` is how far their results lie apart, or ours from the truth."""
    if error is not None and not error < 1e-3:
        raise AssertionError(f"{case}, {peer}: the results differ by {error:.1e} relative.")
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
    beside(VALUES, "weightwatcher", ours, theirs, None, note, None)


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


Pair = Callable[[], tuple[float, torch.Tensor]]


def with_curvlinops(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Pair:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
    )
    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(np.float32)

    def call() -> tuple[float, torch.Tensor]:
        values, vectors = eigsh(operator.to_scipy(), k=1, which="LA", tol=1e-3, v0=start)
        return float(values[0]), torch.from_numpy(vectors[:, 0].copy()).float()

    return call


def with_pyhessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Pair:
    from pyhessian import hessian

    def call() -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        found = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False).eigenvalues(maxIter=300, tol=1e-5)
        return found[0][0], torch.cat([part.flatten() for part in found[1][0]])

    return call


def hessian() -> None:
    model, x, y = trained_network()
    parameters = list(model.parameters())
    case, goal = "top Hessian eigenvalue, digits", "faster than curvlinops and PyHessian at the same residual"

    def ours(tolerance: float) -> Eigenvalues:
        return spectreg.hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)], tolerance=tolerance)

    def residual(value: float, v: torch.Tensor) -> float:
        """‖Hv − value·v‖/value by two plain derivatives."""
        first = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        second = torch.autograd.grad(torch.cat([g.flatten() for g in first]) @ v, parameters)
        return float((torch.cat([g.flatten() for g in second]) - value * v).norm() / value)

    truth = ours(1e-6).values[0]
    for peer, prepare in (("curvlinops with eigsh", with_curvlinops), ("PyHessian", with_pyhessian)):
        try:
            theirs = prepare(model, x, y)
            value, v = theirs()
            reached = residual(value, v)
            error = abs(ours(reached).values[0] / value - 1)
            distances = [abs(found / truth - 1) for found in (ours(reached).values[0], value)]
            note = f"off the value at a residual of 1e-6 by {distances[0]:.0e}, theirs by {distances[1]:.0e}; "
            note += f"both at their residual of {reached:.0e}"
            beside(case, peer, lambda r=reached: ours(r), theirs, error, note, goal=f"top Hessian eigenvalue: {goal}")
        except Exception as error:
            record(failed(NAME, case, "spectreg", peer, error))


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

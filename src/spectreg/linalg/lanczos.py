"""Largest eigenvalues of a symmetric operator known by its products alone, by Lanczos."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.linalg.directions import gaussian_like

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Eigenvalues:
    """The largest algebraic eigenvalues, descending, and how good they are.

    ``residuals[i] = ‖A v − θ v‖₂`` for the unit vector behind ``values[i]``: some eigenvalue of A lies that near.
    ``products`` counts the applications of A. ``converged``: every residual met the tolerance.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    products: int
    converged: bool


@dataclass(frozen=True)
class Goal:
    """``k`` values, each with a residual of at most ``tolerance·|θ|``, by ``max_products`` applications of A."""

    k: int
    tolerance: float
    max_products: int


def lanczos(
    A: Operator,
    start: Float[Tensor, " n"],
    goal: Goal,
    generator: torch.Generator,
    basis_size: int | None = None,
    every: int = 1,
) -> Eigenvalues:
    """The ``k`` largest eigenvalues of ``A`` by Lanczos from ``start``, reorthogonalized, with thick restarts.

    Stops at the first product after which the goal is met; looks only after ``every``
    products, which pays where one costs no more than an eigendecomposition of the basis. An eigenvalue that occurs
    more than once may be found once. Holds ``basis_size + 1`` vectors (thick restart: Wu & Simon, SIAM J. Matrix Anal.
    Appl. 22, 2000); for k = 1 only three, see ``lanczos_largest``.

    >>> A = torch.diag(torch.tensor([-9.0, 1.0, 2.0, 4.0]))
    >>> found = lanczos(A.mv, torch.ones(4), Goal(2, 1e-6, 100), torch.Generator().manual_seed(0))
    >>> [round(value, 5) for value in found.values]
    [4.0, 2.0]
    """
    k, n = goal.k, start.numel()
    if k == 1:
        return lanczos_largest(A, start, goal)
    size = min(n, basis_size or max(2 * k + 2, 32))
    Q = start.new_empty(size + 1, n)
    T = torch.zeros(size, size, dtype=torch.float64)
    Q[0] = normalised(start)
    best, j, scale = Eigenvalues((), (), 0, False), 0, 0.0
    for product in range(1, goal.max_products + 1):
        w = A(Q[j])
        h, beta = orthogonalise(w, Q[: j + 1])
        T[: j + 1, j] = T[j, : j + 1] = h.to(T)
        scale = max(scale, torch.linalg.vector_norm(h).item())
        beta = 0.0 if beta <= 4 * torch.finfo(w.dtype).eps * scale else beta  # the space reached is invariant
        if product % every == 0 or not beta or j + 1 == size or product == goal.max_products:
            theta, S = torch.linalg.eigh(T[: j + 1, : j + 1])
            best = ritz_values(theta, beta * S[-1].abs(), goal, product, torch.finfo(w.dtype).eps)
            if best.converged:
                return best
        following = w / beta if beta else fresh_direction(start, Q[: j + 1], generator)
        j += 1
        if j == size:
            j = restart(Q, T, theta, S, keep=k + (size - k) // 2)
        Q[j] = following
    return best


def ritz_values(theta: Tensor, residuals: Tensor, goal: Goal, product: int, eps: float) -> Eigenvalues:
    """The ``k`` largest of ascending ``theta`` with their residuals, and whether these are small enough."""
    floor = 10 * eps * theta.abs().max().item()
    found = min(goal.k, len(theta))
    best, away = descending(theta, found), descending(residuals, found)
    met = all(r <= max(goal.tolerance * abs(t), floor) for t, r in zip(best, away, strict=True))
    return Eigenvalues(best, away, product, found == goal.k and met)


def lanczos_largest(A: Operator, start: Float[Tensor, " n"], goal: Goal) -> Eigenvalues:
    """The largest eigenvalue of ``A`` by the three-term recurrence alone: three vectors, no restart.

    Vectors that lose their orthogonality only repeat a value already found (Paige 1971), which harms no largest one.

    >>> A = torch.diag(torch.tensor([-9.0, 1.0, 2.0, 4.0]))
    >>> round(lanczos_largest(A.mv, torch.ones(4), Goal(1, 1e-6, 100)).values[0], 5)
    4.0
    """
    previous, v, beta = torch.zeros_like(start), normalised(start), 0.0
    alphas: list[float] = []
    betas: list[float] = []
    best = Eigenvalues((), (), 0, False)
    for j in range(goal.max_products):
        w = A(v) - beta * previous
        alpha = torch.dot(v, w).item()
        w = w.sub_(v, alpha=alpha)
        beta = finite_length(w)
        alphas.append(alpha)
        if j < 50 or j % 10 == 9 or j + 1 == goal.max_products:
            T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
            T += torch.diag(torch.tensor(betas, dtype=torch.float64), -1)
            theta, S = torch.linalg.eigh(T, UPLO="L")
            best = ritz_values(theta, beta * S[-1].abs(), goal, j + 1, torch.finfo(w.dtype).eps)
            if best.converged:
                return best
        betas.append(beta)
        previous, v = v, w / beta
    return best


def descending(values: Tensor, count: int) -> tuple[float, ...]:
    """The last ``count`` of ascending ``values``, last first, as numbers."""
    return tuple(values[-count:].flip(0).tolist())


def normalised(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v)


def orthogonalise(w: Tensor, Q: Tensor) -> tuple[Tensor, float]:
    """Removes from ``w``, in place, its part along the rows of ``Q``; the coefficients and the length left.

    Twice, because once leaves a rounding error that grows with the steps.
    """
    h = Q @ w
    w -= Q.T @ h
    again = Q @ w
    w -= Q.T @ again
    return h + again, finite_length(w)


def finite_length(w: Tensor) -> float:
    length = torch.linalg.vector_norm(w).item()
    if not math.isfinite(length):
        raise ValueError("a product with the operator is not finite: look for NaN or inf in the weights or the data.")
    return length


def fresh_direction(like: Tensor, Q: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows of ``Q``."""
    v = gaussian_like(like, generator)
    orthogonalise(v, Q)
    return normalised(v)


def restart(Q: Tensor, T: Tensor, theta: Tensor, S: Tensor, keep: int) -> int:
    """Shrinks the basis to the ``keep`` best Ritz vectors; returns how many they are."""
    keep = min(keep, len(theta) - 1)
    Q[:keep] = S[:, -keep:].T.to(Q) @ Q[: len(theta)]
    T.zero_()
    T[:keep, :keep] = torch.diag(theta[-keep:])
    return keep

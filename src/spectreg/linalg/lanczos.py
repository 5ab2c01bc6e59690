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
    """The ``k`` largest eigenvalues of ``A`` by Lanczos from ``start``.

    An eigenvalue that occurs more than once may be found once. The units of A do not matter. Holds ``basis_size + 1``
    vectors; for k = 1 only three.

    Args:
        every: Looks at the values after so many products, which pays where one costs no more than an
            eigendecomposition of the basis; 1 stops at the first product after which the goal is met.

    >>> A = torch.diag(torch.tensor([-9.0, 1.0, 2.0, 4.0]))
    >>> largest = lanczos(A.mv, torch.ones(4), Goal(2, 1e-6, 100), torch.Generator().manual_seed(0))
    >>> [round(value, 5) for value in largest.values]
    [4.0, 2.0]
    """
    if goal.k == 1:
        return lanczos_largest(A, start, goal)
    return ThickRestart(start, goal, generator, basis_size).run(A, every)


class Scaled:
    """``A`` divided by a power of two near the largest entry of its first product that is not zero."""

    def __init__(self, A: Operator) -> None:
        self.A = A
        self.scale = 1.0
        self.known = False

    def __call__(self, v: Tensor) -> Tensor:
        w = self.A(v)
        if not self.known:
            largest = w.abs().max().item()
            self.known = 0 < largest < math.inf
            self.scale = 2.0 ** math.frexp(largest)[1] if self.known else 1.0
        return w / self.scale

    def unscaled(self, scaled: Eigenvalues) -> Eigenvalues:
        values, residuals = (tuple(self.scale * x for x in numbers) for numbers in (scaled.values, scaled.residuals))
        return Eigenvalues(values, residuals, scaled.products, scaled.converged)


def lanczos_largest(A: Operator, start: Float[Tensor, " n"], goal: Goal) -> Eigenvalues:
    """The largest eigenvalue of ``A`` by the three-term recurrence alone: three vectors, no restart.

    One product does not do, but for an eigenvector: most directions may be multiplied alike, and one of them not.
    Vectors that lose their orthogonality only repeat a value already found (Paige 1971), which harms no largest one.

    >>> A = torch.diag(torch.tensor([-9.0, 1.0, 2.0, 4.0]))
    >>> round(lanczos_largest(A.mv, torch.ones(4), Goal(1, 1e-6, 100)).values[0], 5)
    4.0
    """
    A = Scaled(A)
    previous, v, beta = torch.zeros_like(start), normalised(start), 0.0
    alphas: list[float] = []
    betas: list[float] = []
    eps = torch.finfo(start.dtype).eps
    for product in range(1, goal.max_products + 1):
        w = A(v) - beta * previous
        alphas.append(torch.dot(v, w).item())
        w = w.sub_(v, alpha=alphas[-1])
        beta = finite_length(w)
        if product <= 50 or product % 10 == 0 or product == goal.max_products:
            T = torch.diag(torch.tensor(alphas, dtype=torch.float64, device="cpu"))
            T += torch.diag(torch.tensor(betas, dtype=torch.float64, device="cpu"), -1)
            theta, S = torch.linalg.eigh(T, UPLO="L")
            best = ritz_values(theta, beta * S[-1].abs(), goal, product, eps)
            if best.converged and (product > 1 or beta <= 10 * eps * abs(alphas[0])):
                break
        betas.append(beta)
        previous, v = v, w / beta
    return A.unscaled(best)


class ThickRestart:
    """Lanczos with full reorthogonalization on a basis of a fixed size (Wu & Simon, SIAM J. Matrix Anal. 22, 2000).

    The rows of ``Q`` are the basis, ``T`` is the operator in it. When the basis is full, its best Ritz vectors begin
    the next one.
    """

    def __init__(
        self, start: Float[Tensor, " n"], goal: Goal, generator: torch.Generator, basis_size: int | None = None
    ) -> None:
        self.size = min(len(start), basis_size or max(2 * goal.k + 2, 32))
        self.Q = start.new_empty(self.size + 1, len(start))
        self.Q[0] = normalised(start)
        self.T = torch.zeros(self.size, self.size, dtype=torch.float64, device="cpu")
        self.goal, self.generator = goal, generator
        self.eps = torch.finfo(start.dtype).eps

    def run(self, A: Operator, every: int) -> Eigenvalues:
        """The values after the first look that meets the goal, or after the last product."""
        A = Scaled(A)
        j, largest = 0, 0.0
        for product in range(1, self.goal.max_products + 1):
            w = A(self.Q[j])
            h, beta = orthogonalise(w, self.Q[: j + 1])
            self.T[: j + 1, j] = self.T[j, : j + 1] = h.to(self.T)
            largest = max(largest, torch.linalg.vector_norm(h).item())
            if beta <= 4 * self.eps * largest:  # the basis spans an invariant space
                beta = 0.0
            j += 1
            full = j == self.size
            if full or not beta or product % every == 0 or product == self.goal.max_products:
                theta, S = torch.linalg.eigh(self.T[:j, :j])
                best = ritz_values(theta, beta * S[-1].abs(), self.goal, product, self.eps)
                if best.converged:
                    break
            following = w / beta if beta else self.fresh_direction(j)
            if full:
                j = self.restart(theta, S)
            self.Q[j] = following
        return A.unscaled(best)

    def restart(self, theta: Tensor, S: Tensor) -> int:
        """Shrink the basis to its best Ritz vectors; returns how many they are."""
        keep = min(self.goal.k + (self.size - self.goal.k) // 2, self.size - 1)
        self.Q[:keep] = S[:, -keep:].T.to(self.Q) @ self.Q[: self.size]
        self.T.zero_()
        self.T[:keep, :keep] = torch.diag(theta[-keep:])
        return keep

    def fresh_direction(self, j: int) -> Tensor:
        """A random unit vector orthogonal to the first ``j`` vectors of the basis."""
        v = gaussian_like(self.Q[0], self.generator)
        orthogonalise(v, self.Q[:j])
        return normalised(v)


def ritz_values(theta: Tensor, residuals: Tensor, goal: Goal, product: int, eps: float) -> Eigenvalues:
    """The ``k`` largest of ascending ``theta`` with their residuals, and whether these are small enough."""
    count = min(goal.k, len(theta))
    floor = 10 * eps * theta.abs().max().item()
    values, away = (tuple(x[-count:].flip(0).tolist()) for x in (theta, residuals))
    met = all(r <= max(goal.tolerance * abs(t), floor) for t, r in zip(values, away, strict=True))
    return Eigenvalues(values, away, product, count == goal.k and met)


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


def normalised(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v)

"""The largest eigenvalue of a block diagonal symmetric operator, from several starts at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.linalg.lanczos import Eigenvalues, Goal, finite_length

BlockOperator = Callable[[Float[Tensor, "starts blocks n"]], Float[Tensor, "starts blocks n"]]
GROWTH = 0.04  # share of the tolerance by which the value may still have grown since it was last looked at
EVERY = 4  # steps from one eigendecomposition of the small matrices to the next, once they are no longer tiny


def largest_of_blocks(
    A: BlockOperator, start: Float[Tensor, "starts blocks n"], goal: Goal
) -> tuple[Eigenvalues, Float[Tensor, "starts blocks"]]:
    """The largest eigenvalue of ``A`` by Lanczos in every block from every start, and what each of them found.

    A residual tells that a value is near *some* eigenvalue. So all blocks and starts go on until each has a small
    residual, or a value that with its residual stays below the largest. Holds three vectors a start, see
    ``lanczos_largest``. ``products`` counts applications of A, whatever the number of starts.

    >>> D = torch.tensor([[1.0, 2.0, 3.0], [0.5, 5.0, 4.0]])
    >>> top, each = largest_of_blocks(lambda x: D * x, torch.ones(1, 2, 3), Goal(1, 1e-6, 100))
    >>> round(top.values[0], 5), each.round(decimals=5)
    (5.0, tensor([[3., 5.]], dtype=torch.float64))
    """
    state = Recurrence.begin(start)
    best, each = Eigenvalues((), (), 0, False), start.new_zeros(start.shape[:2])
    for product in range(1, goal.max_products + 1):
        state.advance(A)
        if product <= EVERY or product % EVERY == 0 or product == goal.max_products:
            before, (each, residuals) = each, state.ritz()
            grown = 1 - before.max().item() / each.max().item() if each.max() > 0 else 0.0
            best = chosen(each, residuals, grown, goal, product, torch.finfo(start.dtype).eps)
            if best.converged:
                break
    return best, each


@dataclass
class Recurrence:
    """The three-term recurrence of every block from every start."""

    previous: Tensor
    v: Tensor
    beta: Tensor
    alphas: list[Tensor]
    betas: list[Tensor]

    @classmethod
    def begin(cls, start: Float[Tensor, "starts blocks n"]) -> "Recurrence":
        length = torch.linalg.vector_norm(start, dim=2, keepdim=True)
        zero = torch.zeros_like(length)
        return cls(torch.zeros_like(start), divided(start, length), zero, [], [])

    def advance(self, A: BlockOperator) -> None:
        """One product; a block whose space is exhausted goes on with zeros."""
        w = A(self.v) - self.beta * self.previous
        alpha = (self.v * w).sum(2, keepdim=True)
        w = w - alpha * self.v
        finite_length(w)
        length = torch.linalg.vector_norm(w, dim=2, keepdim=True)
        size = alpha.abs() + self.beta + length
        self.beta = torch.where(length > 4 * torch.finfo(w.dtype).eps * size, length, 0.0)
        self.alphas.append(alpha)
        self.betas.append(self.beta)
        self.previous, self.v = self.v, divided(w, self.beta)

    def ritz(self) -> tuple[Float[Tensor, "starts blocks"], Float[Tensor, "starts blocks"]]:
        """The largest Ritz value of each, and its residual."""
        diagonal, below = (torch.cat(t, 2).to("cpu", torch.float64) for t in (self.alphas, self.betas))
        T = torch.diag_embed(diagonal) + torch.diag_embed(below[..., :-1], -1)
        theta, S = torch.linalg.eigh(T, UPLO="L")
        return theta[..., -1], below[..., -1] * S[..., -1, -1].abs()


def chosen(each: Tensor, residuals: Tensor, grown: float, goal: Goal, product: int, eps: float) -> Eigenvalues:
    """The largest value, and whether no other can overtake it."""
    top = int(each.argmax())
    value, residual = each.flatten()[top].item(), residuals.flatten()[top].item()
    small = max(goal.tolerance * abs(value), 10 * eps * abs(value))
    met = (residuals <= small) | (each + residuals <= value)
    done = residual <= small and grown <= goal.tolerance * GROWTH and bool(met.all())
    return Eigenvalues((value,), (residual,), product, done)


def divided(x: Tensor, length: Tensor) -> Tensor:
    """``x / length``; zero where the length is."""
    return torch.where(length > 0, x / length, 0.0)

"""Independent float64 oracles: what the library should say, by the slow road."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def printed_algorithm(W: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 as arXiv:1705.10941 prints it: σ = |u|/|v|, nothing normalised."""
    for _ in range(steps):
        u = W @ v
        v = W.T @ u
        sigma = u.norm() / v.norm()
    return sigma, v


def svd_penalty_gradient(
    weight: Tensor,
    matrices: Callable[[Tensor], Sequence[Tensor]],
    each: bool,
    phi: Callable[[Tensor], Tensor] = lambda sigma: sigma**2 / 2,
    k: int = 1,
) -> tuple[Tensor, Tensor]:
    """σ (the largest of the blocks) and the gradient of Σφ(σ) by the weight: full SVDs and autograd.

    With ``each`` every block counts, otherwise the ``k`` largest singular values of them all.
    """
    W = weight.detach().double().requires_grad_()
    values = [torch.linalg.svdvals(matrix)[:k] for matrix in matrices(W)]
    counted = torch.cat(values) if each else torch.cat(values).topk(min(k, len(torch.cat(values)))).values
    (gradient,) = torch.autograd.grad(phi(counted).sum(), W)
    return torch.cat(values).max().detach(), gradient

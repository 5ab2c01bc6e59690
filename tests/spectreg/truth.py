"""Independent float64 oracles: what the library should say, by the slow road."""

import torch
from torch import Tensor


def svd_gradient(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """σ₁ of each block and uvᵀ of its top singular pair, from a full SVD in float64."""
    U, S, Vh = torch.linalg.svd(matrices.detach().double(), full_matrices=False)
    return S[:, 0], U[:, :, :1] @ Vh[:, :1, :]


def printed_algorithm(W: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 as arXiv:1705.10941 prints it: σ = |u|/|v|, nothing normalised."""
    for _ in range(steps):
        u = W @ v
        v = W.T @ u
        sigma = u.norm() / v.norm()
    return sigma, v

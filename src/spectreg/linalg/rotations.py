"""The singular value decomposition of many small square matrices, without waiting for the device."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

SWEEPS = 2

Matrices = Float[Tensor, "batch k k"]


class Round(NamedTuple):
    """Pairs of rows that can be turned at the same time."""

    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]


def tournament(k: int, device: torch.device) -> list[Round]:
    """Every pair of ``k`` once, in as few rounds as there can be.

    >>> [list(zip(first.tolist(), second.tolist())) for first, second in tournament(4, torch.device("cpu"))]
    [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    seats, rounds = list(range(k + k % 2)), []
    for _ in range(k - 1 + k % 2 if k > 1 else 0):
        pairs = [sorted((seats[i], seats[-1 - i])) for i in range(len(seats) // 2)]
        sides = zip(*sorted(pair for pair in pairs if pair[1] < k), strict=True)
        rounds.append(Round(*(torch.tensor(side, device=device) for side in sides)))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def decomposed(M: Matrices, rounds: list[Round]) -> tuple[Matrices, Float[Tensor, "batch k"], Matrices]:
    """A, s, B with AᵀMB = diag(s): by `torch.linalg.svd` on a CPU, by `turned` elsewhere.

    On an accelerator ``svd`` reads back whether it converged, and so waits for all work before it.
    """
    if M.device.type != "cpu":
        return turned(M, rounds)
    A, s, Bh = torch.linalg.svd(M)
    return A, s, Bh.mT


def turned(
    M: Matrices, rounds: list[Round], sweeps: int = SWEEPS
) -> tuple[Matrices, Float[Tensor, "batch k"], Matrices]:
    """Orthogonal A and B and s ≥ 0 such that AᵀMB is diag(s) but for what the sweeps leave; the largest comes first.

    Two-sided Jacobi rotations (Kogbetliantz 1955), which converge quadratically. The matrices that the power iteration
    hands over are diagonal but for what changed since its last step, so that few sweeps do. A and B are orthogonal
    even where they do not.

    >>> M = torch.tensor([[[3.0, 0.0], [4.0, 5.0]]])
    >>> A, s, B = turned(M, tournament(2, M.device))
    >>> s.square().round()
    tensor([[45.,  5.]])
    """
    A = torch.eye(M.shape[1], dtype=M.dtype, device=M.device).repeat(len(M), 1, 1)
    B = A.clone()
    for p, q in rounds * sweeps:
        left, right = _angles(M[:, p, p], M[:, p, q], M[:, q, p], M[:, q, q])
        L, R = (_rotation(A, p, q, angle) for angle in (left, right))
        M, A, B = L.mT @ M @ R, A @ L, B @ R
    s = M.diagonal(dim1=1, dim2=2)
    return A * torch.where(s < 0, -1.0, 1.0).to(s)[:, None], s.abs(), B


def _angles(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """By how much to turn from the left and from the right to make [[a, b], [c, d]] diagonal, the larger first."""
    both, difference = torch.atan2(c - b, a + d), torch.atan2(c + b, a - d)
    return (difference + both) / 2, (difference - both) / 2


def _rotation(like: Matrices, p: Tensor, q: Tensor, angle: Float[Tensor, "batch pairs"]) -> Matrices:
    R = torch.eye(like.shape[1], dtype=like.dtype, device=like.device).repeat(len(like), 1, 1)
    cosine, sine = angle.cos(), angle.sin()
    R[:, p, p], R[:, q, q], R[:, p, q], R[:, q, p] = cosine, cosine, -sine, sine
    return R

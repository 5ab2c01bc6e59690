"""The eigenvectors of many small symmetric matrices at once, without waiting for the device."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

Matrices = Float[Tensor, "batch k k"]


@cache
def rounds(k: int, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Every pair of ``k`` indices once, in as few rounds as there can be: a permutation that swaps pairs, and signs.

    The sign is 1 for the first of a pair, -1 for the second and 0 for an index that rests.

    >>> [sign.tolist() for _, sign in rounds(3, torch.device("cpu"), torch.float32)]
    [[0.0, 1.0, -1.0], [1.0, 0.0, -1.0], [1.0, -1.0, 0.0]]
    """
    seats, rounds = list(range(k + k % 2)), []
    for _ in range(k - 1 + k % 2 if k > 1 else 0):
        partner = dict(zip(seats, reversed(seats), strict=True))
        order = [partner[i] if partner[i] < k else i for i in range(k)]
        signs = [(j > i) - (j < i) for i, j in enumerate(order)]
        swap = torch.eye(k, dtype=dtype, device=device)[order]
        rounds.append((swap, torch.tensor(signs, dtype=dtype, device=device)))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def eigenbasis(G: Matrices) -> tuple[Float[Tensor, "batch k"], Matrices]:
    """Eigenvalues, the largest first, and an orthogonal B with BᵀGB diagonal.

    By LAPACK on a CPU, by `rotated` elsewhere: on an accelerator ``torch.linalg.eigh`` reads back whether it converged,
    and so waits for all work before it. On a CPU it takes a tenth of the time of the rotations.
    """
    if G.device.type != "cpu":
        return rotated(G)
    values, B = torch.linalg.eigh(G)
    return values.flip(1), B.flip(2)


def rotated(G: Matrices, sweeps: int | None = None) -> tuple[Float[Tensor, "batch k"], Matrices]:
    """As `eigenbasis`, by Jacobi rotations of all pairs of a round at the same time.

    By default there are as many sweeps as random matrices need for double precision. B is orthogonal whatever they
    leave.

    >>> values, B = rotated(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64))
    >>> values
    tensor([[3., 1.]], dtype=torch.float64)
    """
    sweeps = min(4 + G.shape[1] // 2, 10) if sweeps is None else sweeps
    B = torch.eye(G.shape[1], dtype=G.dtype, device=G.device).expand_as(G)
    for swap, sign in rounds(G.shape[1], G.device, G.dtype) * sweeps:
        g, d = (G * swap).sum(2), sign * G.diagonal(dim1=1, dim2=2)
        # Both sums are the same to the bit for the two of a pair: B is orthogonal whatever the rounding of G.
        angle = sign * torch.atan2(g + g @ swap, d + d @ swap) / 2
        R = torch.diag_embed(angle.cos()) - angle.sin()[:, :, None] * swap
        G, B = R.mT @ G @ R, B @ R
    return G.diagonal(dim1=1, dim2=2), B

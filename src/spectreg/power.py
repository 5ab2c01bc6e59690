"""The top singular triplet of a linear map, one warm step at a time."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Triplet(NamedTuple):
    """Estimates of the largest singular value of each block and of its unit left and right singular vectors."""

    sigma: Float[Tensor, " blocks"]
    u: Float[Tensor, "blocks outputs"]
    v: Float[Tensor, "blocks inputs"]


def power_step(W: Float[Tensor, "blocks outputs inputs"], v: Float[Tensor, "blocks inputs"]) -> Triplet:
    """One step of power iteration towards the top singular triplet of each block of ``W``.

    ``u = Wv/|Wv|``, ``w = Wᵀu``, ``sigma = |w|``, ``v = w/sigma`` (Algorithm 1 of arXiv:1705.10941 with its missing
    normalisation). ``sigma`` never exceeds the true norm; the shortfall shrinks by ``(σ₂/σ₁)⁴`` a step.

    Args:
        W: Blocks of a weight. Not modified.
        v: Guess for the top right singular vectors; any length but zero. Not modified.

    Returns:
        ``sigma`` in the units of the weight; unit ``u`` and ``v``. For a zero block, sigma 0 and ``v`` as it came.

    >>> W = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    >>> v = torch.tensor([[1.0, 1.0]])
    >>> for _ in range(20):
    ...     sigma, u, v = power_step(W, v)
    >>> sigma
    tensor([3.])
    """
    u, _ = normalised(torch.bmm(W, v.unsqueeze(2)).squeeze(2), v.new_zeros(()))
    new_v, sigma = normalised(torch.bmm(u.unsqueeze(1), W).squeeze(1), v)
    return Triplet(sigma, u, new_v)


def normalised(
    x: Float[Tensor, "blocks size"], otherwise: Float[Tensor, "*any"]
) -> tuple[Float[Tensor, "blocks size"], Float[Tensor, " blocks"]]:
    """Each row of ``x`` over its length, and the lengths; ``otherwise`` where a length is zero or not finite."""
    length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).to(x.dtype)
    usable = (length > 0) & length.isfinite()
    return torch.where(usable[:, None], x / length[:, None], otherwise), length

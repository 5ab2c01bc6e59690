"""σ to a thousandth, also just after a step that has moved the weight: Rayleigh and Ritz on a small Krylov space."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.linalg.eigenbasis import eigenbasis
from spectreg.maps.factors import Value
from spectreg.power_iteration.step import Side, Vectors, full_precision


def follow(vectors: Vectors, weights: Sequence[Value], depth: int) -> None:
    """Renew σ, u and v from the span of V, WᵀWV, …, (WᵀW)^depth V: ``2·depth + 1`` products a weight.

    As a power step, σ never exceeds the true norm but by rounding; the shortfall is that of block Lanczos. What is
    zero or not finite keeps its vectors. Of weights sharded by rows each rank has its rows of all products with W
    without asking anybody, and they come together at the end: ``depth + 1`` messages.
    """
    probe, u_side, v_side = copy.copy(vectors), vectors.u_side, vectors.v_side
    size = vectors.sigma[:, :1].nan_to_num(1.0, 1.0)  # divided by, so that σ² need not be a number of float32
    over = torch.where(size > 0, size, 1.0).reciprocal().t()

    def forward_share(V: Float[Tensor, "m v"]) -> Float[Tensor, "m u"]:
        probe.vs = V.split(v_side.widths, 1)
        return torch.cat(probe.shares(weights), 1)

    def adjoint(U: Float[Tensor, "m u"]) -> Float[Tensor, "m v"]:
        probe.us = U.split(u_side.widths, 1)
        return torch.cat(probe.products(weights, from_u=True), 1)

    with full_precision(vectors.U):
        basis = orthonormal(vectors.V, None, v_side)
        images = image = forward_share(basis)
        for _ in range(depth):
            block = orthonormal(adjoint(image * u_side.spread(over)), basis, v_side)
            image = forward_share(block)
            basis, images = torch.cat([basis, block]), torch.cat([images, image])
        images = torch.cat(probe.whole(images.split(u_side.widths, 1)), 1)
    G = u_side.gram(images, images)
    finite = G.isfinite().flatten(1).all(1)
    squares, B = eigenbasis(torch.where(finite[:, None, None], G, 0.0))
    sigma, B = squares[:, : vectors.m].clamp_min(0.0).sqrt(), B[..., : vectors.m]
    alive = sigma > sigma[:, :1] * 1e-6
    B = torch.where(alive[:, None], B, 0.0)
    v = v_side.combine(basis, B)
    u = u_side.combine(images, B / torch.where(alive, sigma, 1.0)[:, None])
    kept = alive.t().to(v.dtype)
    vectors.V.copy_(torch.where(v_side.spread(kept) > 0, v, vectors.V))
    vectors.U.copy_(torch.where(u_side.spread(kept) > 0, u, vectors.U))
    vectors.sigma.copy_(torch.where(finite[:, None], sigma, torch.nan))


def orthonormal(
    raw: Float[Tensor, "m columns"], basis: Float[Tensor, "n columns"] | None, side: Side
) -> Float[Tensor, "m columns"]:
    """The rows of ``raw`` made orthonormal, and at right angles to ``basis``; rows that add nothing become 0.

    Twice: what the first subtraction leaves of vectors near the span of the basis is not at right angles to it.
    """
    raw = raw.nan_to_num(0.0, 0.0, 0.0)
    for share in (32 * torch.finfo(raw.dtype).eps, 0.5):
        before = side.gram(raw, raw).diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
        if basis is not None:
            raw = raw - side.combine(basis, side.gram(basis, raw))
        squares, B = eigenbasis(side.gram(raw, raw))
        alive = (squares > before * share**2) & (squares > 0)
        raw = side.combine(raw, B * torch.where(alive, squares, torch.inf).rsqrt()[:, None])
    return raw

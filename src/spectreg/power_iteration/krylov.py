"""σ to a thousandth, also just after a step that has moved the weight: Rayleigh and Ritz on a small Krylov space."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.linalg.eigenbasis import eigenbasis
from spectreg.power_iteration.step import Vectors, full_precision

Rows = list[Tensor]  # of each weight: vectors as rows, those of its blocks side by side


def follow(vectors: Vectors, weights: Sequence[Tensor], depth: int) -> None:
    """Renew σ, u and v from the span of V, WᵀWV, …, (WᵀW)^depth V: ``2·depth + 1`` products a weight.

    As a power step, σ never exceeds the true norm but by rounding; the shortfall is that of block Lanczos. What is
    zero or not finite keeps its vectors.
    """
    probe, blocks = copy.copy(vectors), [m.blocks for m in vectors.maps]
    with full_precision(vectors.U):
        probe.vs = block = orthonormal(list(vectors.vs), None, blocks)
        image = probe.products(weights, from_u=False)
        basis, images = block, image
        for _ in range(depth):
            probe.us = unit(image, blocks)
            block = orthonormal(probe.products(weights, from_u=True), basis, blocks)
            probe.vs = block
            image = probe.products(weights, from_u=False)
            basis, images = joined(basis, block), joined(images, image)
    G = gram(images, images, blocks)
    finite = G.isfinite().flatten(1).all(1)
    squares, B = eigenbasis(torch.where(finite[:, None, None], G, 0.0))
    sigma, B = squares[:, : vectors.m].clamp_min(0.0).sqrt(), B[..., : vectors.m]
    alive = sigma > sigma[:, :1] * 1e-6
    B = torch.where(alive[:, None], B, 0.0)
    v = torch.cat(combined(basis, B, blocks), 1)
    u = torch.cat(combined(images, B / torch.where(alive, sigma, 1.0)[:, None], blocks), 1)
    kept = alive.t().to(v.dtype)
    vectors.V.copy_(torch.where(vectors.v_side.spread(kept) > 0, v, vectors.V))
    vectors.U.copy_(torch.where(vectors.u_side.spread(kept) > 0, u, vectors.U))
    vectors.sigma.copy_(torch.where(finite[:, None], sigma, torch.nan))


def orthonormal(raw: Rows, basis: Rows | None, blocks: Sequence[int]) -> Rows:
    """The rows of ``raw`` made orthonormal, and at right angles to ``basis``; rows that add nothing become 0.

    Twice: what the first subtraction leaves of vectors near the span of the basis is not at right angles to it.
    """
    raw = [x.nan_to_num(0.0, 0.0, 0.0) for x in raw]
    for share in (32 * torch.finfo(raw[0].dtype).eps, 0.5):
        before = gram(raw, raw, blocks).diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
        if basis is not None:
            inside = combined(basis, gram(basis, raw, blocks), blocks)
            raw = [x - y for x, y in zip(raw, inside, strict=True)]
        squares, B = eigenbasis(gram(raw, raw, blocks))
        alive = (squares > before * share**2) & (squares > 0)
        raw = combined(raw, B * torch.where(alive, squares, torch.inf).rsqrt()[:, None], blocks)
    return raw


def unit(x: Rows, blocks: Sequence[int]) -> Rows:
    """Each vector over its length, so that σ² need not be a number of float32."""
    lengths = gram(x, x, blocks).diagonal(dim1=1, dim2=2).sqrt()
    return combined(x, torch.diag_embed(torch.where(lengths > 0, lengths, 1.0).reciprocal()), blocks)


def gram(x: Rows, y: Rows, blocks: Sequence[int]) -> Float[Tensor, "blocks rows _"]:
    """The products of the vectors of each block, in float64 where there is one."""
    pairs = zip(x, y, blocks, strict=True)
    return torch.cat([torch.einsum("kbi,lbi->bkl", _wide(a, n), _wide(b, n)) for a, b, n in pairs])


def combined(x: Rows, C: Float[Tensor, "blocks rows _"], blocks: Sequence[int]) -> Rows:
    """The vectors of each block, as columns, times its matrix of ``C``."""
    parts = zip(x, C.to(x[0].dtype).split(list(blocks)), blocks, strict=True)
    return [torch.einsum("kbi,bkl->lbi", a.unflatten(1, (n, -1)), c).flatten(1) for a, c, n in parts]


def joined(x: Rows, y: Rows) -> Rows:
    """The rows of both."""
    return [torch.cat(pair) for pair in zip(x, y, strict=True)]


def _wide(x: Tensor, blocks: int) -> Tensor:
    return (x if x.device.type == "mps" else x.double()).unflatten(1, (blocks, -1))

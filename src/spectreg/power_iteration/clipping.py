"""Every singular value above a cap cut down to it: the nearest matrix of at most that norm."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from spectreg.maps.matrix import MatrixMap
from spectreg.power_iteration.layout import is_sharded
from spectreg.power_iteration.step import Vectors
from spectreg.weights.selection import Weight

FAR_ABOVE = 8.0  # times the cap: from there on the square of σ asks for float64


class Piece(NamedTuple):
    """Some blocks of a weight, or parts of them, as this rank holds them: the memory, its map, and which blocks."""

    W: Tensor
    map: MatrixMap
    blocks: slice


def clip_(vectors: Vectors, weights: Sequence[Any], caps: Sequence[float]) -> None:
    """W ← W − Σ(σᵢ − c)₊uᵢvᵢᵀ over all singular values of each block; ``vectors`` are then the largest that are left.

    They come from the eigenvectors of WᵀW or WWᵀ, of the smaller side, exact to rounding. Of a sharded weight it is the
    side that is whole on every rank: one all-reduce of all these matrices is all that the ranks say to each other; each
    then cuts its own shard, and only σ of ``vectors`` is renewed. What is not finite is left alone.
    """
    sides = [of_inputs(m, W) for m, W in zip(vectors.maps, weights, strict=True)]
    pieces = [pieces_of(m, W) for m, W in zip(vectors.maps, weights, strict=True)]

    def spectra(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        jobs = zip(vectors.maps, pieces, sides, vectors.counts, caps, strict=True)
        shares = [gram(m, weight if counts else [], inputs, c, vectors.U.new_empty(0, dtype=dtype))
                  for m, weight, inputs, counts, c in jobs]  # fmt: skip
        return [spectrum(G) for G in vectors.summed(shares)]

    decomposed = spectra(vectors.U.dtype)
    near = all(bool((sigma < FAR_ABOVE).all()) for sigma, _ in decomposed)  # not so where float32 has overflown
    if not near and vectors.U.device.type != "mps":
        decomposed = spectra(torch.float64)
    for i, (sigma, B) in enumerate(decomposed):
        count = int((sigma > 1).sum(1).max())
        if count:
            for p in pieces[i]:
                cut_(p, sides[i], sigma[p.blocks, :count], B[p.blocks, :, :count])
        m, largest = vectors.m, caps[i] * sigma[:, : vectors.m].clamp_max(1.0)
        vectors.sigmas[i].copy_(largest)
        if not is_sharded(weights[i]):
            renew(vectors, i, weights[i], largest, B[..., :m], sides[i])


def gram(m: Any, pieces: Sequence[Piece], inputs: bool, cap: float, like: Tensor) -> Float[Tensor, "blocks n n"]:
    """This rank's share of WᵀW/c² if of ``inputs``, else of WWᵀ/c²."""
    n = m.inputs if inputs else m.outputs
    G = like.new_zeros(m.blocks, n, n)
    for p in pieces:
        A = p.map.matrices(p.W).to(G.dtype) / cap
        G[p.blocks] += A.mT @ A if inputs else A @ A.mT
    return G


def spectrum(G: Float[Tensor, "blocks n n"]) -> tuple[Float[Tensor, "blocks n"], Float[Tensor, "blocks n n"]]:
    """The roots of the eigenvalues, the largest first, and the eigenvectors; NaN where anything is not finite."""
    finite = G.isfinite().flatten(1).all(1)
    squares, B = torch.linalg.eigh(torch.where(finite[:, None, None], G, 0.0))
    sigma = torch.where(finite[:, None], squares.clamp_min(0.0).sqrt(), torch.nan)
    return sigma.flip(1), B.flip(2)


def renew(vectors: Vectors, i: int, W: Tensor, sigma: Tensor, B: Tensor, inputs: bool) -> None:
    """Take the vectors of the weight ``i`` from the eigenvectors; those of values that are 0 or NaN stay."""
    A = vectors.maps[i].matrices(W).to(B.dtype)
    other = (A @ B if inputs else A.mT @ B) / sigma[:, None]
    for mine, x in zip((vectors.us[i], vectors.vs[i]), (other, B) if inputs else (B, other), strict=True):
        counts = (sigma > 0)[:, None].expand_as(x)
        mine.copy_(torch.where(as_rows(counts), as_rows(x), mine))


def cut_(p: Piece, inputs: bool, sigma: Float[Tensor, "blocks k"], V: Float[Tensor, "blocks n k"]) -> None:
    """W ← W(I − VDVᵀ) if of ``inputs``, else (I − VDVᵀ)W, with D = (1 − 1/σ)₊ of the ``k`` largest, in units of c."""
    A = p.map.matrices(p.W).to(V.dtype)
    D = (1 - 1 / sigma.clamp_min(1.0))[:, None]
    other = torch.where(D > 0, (A @ V if inputs else A.mT @ V) * D, 0.0)
    u, v = (other, V) if inputs else (V, other)
    p.map.add_outer_(p.W, as_rows(u), as_rows(v), alpha=-1.0)


def as_rows(x: Shaped[Tensor, "blocks n k"]) -> Shaped[Tensor, "k _"]:
    return x.movedim(2, 0).flatten(1)


def pieces_of(m: Any, W: Any) -> list[Piece]:
    if not is_sharded(W):
        return [Piece(W, m, slice(None))]
    from spectreg.power_iteration import shards

    local = W.to_local()
    return [Piece(local[p.local], p.map, slice(p.block, p.block + 1)) for p in shards.pieces_of(m, W)]  # type: ignore[arg-type]


def of_inputs(m: Any, W: Any) -> bool:
    """Whether WᵀW is taken, not WWᵀ: where it is the smaller, or where rows are sharded."""
    if not is_sharded(W):
        return bool(m.inputs <= m.outputs)
    from spectreg.power_iteration.shards import is_sharded_by_columns

    return not is_sharded_by_columns(m, W)


def refuse_uncut(w: Weight, W: Any) -> None:
    """Refuse weights that are no matrices, or of which no side is whole on any rank."""
    if not isinstance(w.map, MatrixMap):
        raise ValueError(
            f"{w.name!r} is no matrix by itself (map='operator', or a product), whose singular values could be cut one "
            "by one: use by='scale' for it."
        )
    if is_sharded(W) and len({p.dim for p in W.placements if p.is_shard()}) > 1:
        raise NotImplementedError(
            f"weight {w.name!r} is sharded by rows and by columns, so that no rank can cut its own: use by='scale'."
        )

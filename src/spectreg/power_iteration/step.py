"""The top singular triplets of linear maps, one warm step at a time."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectreg.linalg.rotations import decomposed, tournament
from spectreg.maps.base import LinearMap


class Triplets:
    """Estimates of the ``k`` largest singular values of many maps, and of their singular vectors.

    The vectors of all maps lie one after the other in two flat buffers, so that a step costs two products a weight
    and a handful of calls for all of them together.

    One step is ``u = Wv/|Wv|``, ``w = Wᵀu``, ``sigma = |w|``, ``v = w/sigma`` (Algorithm 1 of arXiv:1705.10941 with
    its missing normalisation). ``sigma`` never exceeds the true norm; the shortfall shrinks by ``(σ₂/σ₁)⁴`` a step.
    For a zero map sigma is 0, for one that is not finite NaN or infinity; ``u`` and ``v`` then stay as they were.

    Args:
        maps: The maps; the weights themselves are handed to each step, in the same order.
        u, v: Of each map, ``blocks × outputs × k`` and ``blocks × inputs × k``; copied.
        sigma: Of each map, ``blocks × k``; copied.

    >>> from spectreg.maps.matrix import MatrixMap
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> triplets = Triplets([MatrixMap((2, 2))], [torch.zeros(1, 2, 1)], [torch.ones(1, 2, 1)], [torch.zeros(1, 1)])
    >>> triplets.advance([W], halves=40)
    >>> triplets.sigma
    tensor([3.])
    """

    def __init__(
        self, maps: Sequence[LinearMap], u: Sequence[Tensor], v: Sequence[Tensor], sigma: Sequence[Tensor]
    ) -> None:
        self.maps = list(maps)
        self.k = sigma[0].shape[-1]
        self.x, self.sigma = (torch.cat([x.flatten() for x in parts]) for parts in ((*u, *v), sigma))
        self.u_sizes, self.v_sizes = ([x.numel() for x in side] for side in (u, v))
        self.u, self.v = self.x.split([sum(self.u_sizes), sum(self.v_sizes)])
        self.us: Sequence[Tensor] = self.u.split(self.u_sizes)
        self.vs: Sequence[Tensor] = self.v.split(self.v_sizes)
        self.sigmas = self.sigma.split([x.numel() for x in sigma])
        blocks = [m.blocks for m in maps]
        self.u_segments = Segments.of([m.outputs for m in maps], blocks, self.k, self.u.device)
        self.v_segments = Segments.of([m.inputs for m in maps], blocks, self.k, self.u.device)
        self.segments = self.u_segments.then(self.v_segments)
        self.rounds = tournament(self.k, self.u.device)

    def advance(self, weights: Sequence[Tensor], halves: int, from_u: bool = False) -> None:
        """Take ``halves`` half steps: u from v and v from u in turn, beginning with v from u if ``from_u``."""
        with full_precision(self.x):
            while halves > 0:
                if not from_u and halves > 1 and self.k == 1:
                    self._whole_step(weights)
                    halves -= 2
                else:
                    self._half_step(weights, adjoint=from_u)
                    halves, from_u = halves - 1, not from_u

    def _half_step(self, weights: Sequence[Tensor], adjoint: bool) -> None:
        raw = self._products(weights, adjoint)
        if self.k > 1:
            self._rotate(raw, *((self.vs, self.us) if adjoint else (self.us, self.vs)))
            return
        x, segments = (self.v, self.v_segments) if adjoint else (self.u, self.u_segments)
        flat = torch.cat(raw)
        length = lengths(flat, segments)
        self.sigma.copy_(length)
        keep_normalised(x, flat, length, segments)

    def _whole_step(self, weights: Sequence[Tensor]) -> None:
        """u from v and v from u, both normalised afterwards and together.

        v is divided by the last σ before: Wᵀ(Wv) would be of the size σ², which float32 cannot hold where it can σ.
        """
        most = 1e30 if self.x.dtype == torch.float32 else 1e140
        scale = self.sigma.clamp(1 / most, most).nan_to_num_(1.0).reciprocal_()
        guess, raw = torch.empty_like(self.v), torch.empty_like(self.x)
        multiply(self.v, scale, self.v_segments, out=guess)
        self._round_trips(weights, guess.split_with_sizes(self.v_sizes), raw)
        length = lengths(raw, self.segments)
        u_length, v_length = length.chunk(2)
        v_length.nan_to_num_(inf, inf)  # inf - inf in Wᵀu: overflown, and put right at the next step by the σ of this
        torch.div(v_length, u_length.clamp_min_(torch.finfo(length.dtype).tiny), out=self.sigma)
        keep_normalised(self.x, raw, length, self.segments)

    def _round_trips(self, weights: Sequence[Tensor], guesses: Sequence[Tensor], raw: Tensor) -> None:
        """Write Wv of each weight, then WᵀWv of each, to the flat buffer ``raw``."""
        parts = raw.split_with_sizes(self.u_sizes + self.v_sizes)
        us, ws = parts[: len(self.maps)], parts[len(self.maps) :]
        for m, W, v, u, w in zip(self.maps, weights, guesses, us, ws, strict=True):
            m.round_trip(W, v, u, w)

    def _products(self, weights: Sequence[Tensor], adjoint: bool) -> list[Tensor]:
        """Wᵀu or Wv of each weight."""
        if adjoint:
            return [m.adjoint(W, u, self.k) for m, W, u in zip(self.maps, weights, self.us, strict=True)]
        return [m.forward(W, v, self.k) for m, W, v in zip(self.maps, weights, self.vs, strict=True)]

    def _rotate(self, raw: Sequence[Tensor], these: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """From ``raw`` = W·others: orthonormal ``these``, and both turned so that theseᵀ·W·others is diagonal.

        The turn (Rayleigh and Ritz) separates singular values that lie close together, where orthogonalising alone
        would need as many steps as they are close.
        """
        blocks = [m.blocks for m in self.maps]
        Ys = [y.view(n, -1, self.k) for n, y in zip(blocks, raw, strict=True)]
        scales = torch.cat([Y.abs().amax((1, 2)) for Y in Ys])[:, None]
        usable = (scales > 0) & scales.isfinite()
        Qs, Rs = zip(*map(_orthogonal, Ys, scales.split(blocks), usable.split(blocks)), strict=True)
        A, s, B = decomposed(torch.cat(Rs), self.rounds)
        self.sigma.copy_(torch.where(usable, s * scales, scales).flatten())
        turned = zip(usable[..., None].split(blocks), Qs, A.split(blocks), B.split(blocks), these, others, strict=True)
        for fine, Q, left, right, x, other in turned:
            X, other3 = x.view(len(Q), -1, self.k), other.view(len(Q), -1, self.k)
            X.copy_(torch.where(fine, Q @ left, X))
            other3.copy_(torch.where(fine, other3 @ right, other3))

    def residuals(self, weights: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
        """‖Wᵀu − σv‖ of each map, the largest of its pairs, for u = Wv/|Wv| and σ = |Wv|. Nothing is changed."""
        probe = copy.copy(self)
        u = [
            x.view(m.blocks, -1, self.k) for m, x in zip(self.maps, self._products(weights, adjoint=False), strict=True)
        ]
        sigma = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in u]
        probe.us = [torch.where(s > 0, x / s, x).flatten() for x, s in zip(u, sigma, strict=True)]
        w = [
            x.view(m.blocks, -1, self.k) for m, x in zip(self.maps, probe._products(weights, adjoint=True), strict=True)
        ]
        gaps = [x - s * v.view_as(x) for x, s, v in zip(w, sigma, self.vs, strict=True)]
        return [torch.linalg.vector_norm(x, dim=1).amax() for x in gaps]

    def stable_ranks(self, weights: Sequence[Tensor]) -> list[Float[Tensor, ""]]:
        """‖W‖_F²/σ² of each map; the least of blocks that are maps of their own."""
        ranks = []
        for m, squares, sigma in zip(self.maps, self._squares(weights), self.sigmas, strict=True):
            largest = sigma.view(m.blocks, self.k).amax(1).double().square()
            ranks.append(squares.sum() / largest.max() if m.norm == "max" else (squares / largest).min())
        return ranks

    def _squares(self, weights: Sequence[Tensor]) -> list[Float[Tensor, " blocks"]]:
        """‖W‖_F² of each block."""
        return [m.squares(W) for m, W in zip(self.maps, weights, strict=True)]

    def add_outer_(self, targets: Sequence[Tensor], scale: Float[Tensor, " values"], rates: Sequence[Any]) -> None:
        """Add ``rate·scale·uvᵀ`` to each target in place; rates are numbers or tensors."""
        scaled = torch.empty_like(self.u)
        multiply(self.u, scale.to(self.u.dtype), self.u_segments, out=scaled)
        pairs = zip(targets, scaled.split_with_sizes(self.u_sizes), self.vs, rates, strict=True)
        with full_precision(self.x):
            for i, (G, u, v, rate) in enumerate(pairs):
                u, alpha = (u * rate, 1.0) if isinstance(rate, Tensor) else (u, rate)
                self.add_one_(i, G, u, v, alpha)

    def add_one_(self, i: int, G: Tensor, u: Float[Tensor, " u"], v: Float[Tensor, " v"], alpha: float = 1.0) -> None:
        """Add alpha·uvᵀ, for map ``i``, to ``G``."""
        self.maps[i].add_outer_(G, u, v, self.k, alpha)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast does not lower the products with ``x``."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


def _orthogonal(Y: Tensor, scale: Float[Tensor, "blocks 1"], usable: Bool[Tensor, "blocks 1"]) -> tuple[Tensor, Tensor]:
    """Q and R of Y/scale; of the identity where that cannot be taken."""
    identity = torch.eye(*Y.shape[1:], dtype=Y.dtype, device=Y.device)
    return torch.linalg.qr(torch.where(usable[..., None], Y / scale[..., None], identity))


class Segments(NamedTuple):
    """The vectors of all blocks in a flat buffer: whose each element is, and where each begins."""

    owners: Int[Tensor, " elements"]
    offsets: Int[Tensor, " boundaries"]
    sizes: list[int]

    @classmethod
    def of(cls, sizes: Sequence[int], blocks: Sequence[int], k: int, device: torch.device) -> "Segments":
        """Those of ``blocks`` × ``size`` × ``k`` numbers of each map; each of the ``k`` owns its own."""
        index, first, each = [], 0, []
        for size, count in zip(sizes, blocks, strict=True):
            values = torch.arange(first, first + count * k, dtype=torch.int32, device="cpu").view(count, 1, k)
            index.append(values.expand(count, size, k).flatten())
            each += [size * k] * count
            first += count * k
        offsets = torch.tensor([0, *accumulate(each)], device="cpu")
        return cls(torch.cat(index).to(device), offsets.to(device), each)

    def then(self, other: "Segments") -> "Segments":
        """These, followed by others of as many owners."""
        owners = torch.cat([self.owners, other.owners + (self.owners[-1] + 1)])
        return Segments(
            owners, torch.cat([self.offsets, other.offsets[1:] + self.offsets[-1]]), self.sizes + other.sizes
        )

    @property
    def are_long(self) -> bool:
        """Whether one call a segment costs less than an index for each element."""
        return self.owners.shape[0] > 4096 * len(self.sizes)


def lengths(x: Float[Tensor, " elements"], segments: Segments) -> Float[Tensor, " values"]:
    """The Euclidean length of each segment, taken in float64, where the squares of float32 cannot overflow."""
    wide = x.dtype if x.device.type == "mps" else torch.float64
    if segments.are_long:
        return torch.stack(torch._foreach_norm(x.split_with_sizes(segments.sizes), 2, wide))
    squares = x.to(wide, copy=True)
    squares *= squares
    return torch.segment_reduce(squares, "sum", offsets=segments.offsets, unsafe=True).sqrt_()


def multiply(
    x: Float[Tensor, " elements"],
    factors: Float[Tensor, " values"],
    segments: Segments,
    out: Float[Tensor, " elements"],
) -> None:
    """Each vector in the segments of ``x`` times its factor."""
    if not segments.are_long:
        torch.mul(x, factors.index_select(0, segments.owners), out=out)
        return
    parts, products = x.split_with_sizes(segments.sizes), out.split_with_sizes(segments.sizes)
    for part, own, product in zip(parts, factors.view(len(parts), -1), products, strict=True):
        torch.mul(part.view(-1, len(own)), own, out=product.view(-1, len(own)))


def keep_normalised(
    x: Float[Tensor, " elements"],
    raw: Float[Tensor, " elements"],
    length: Float[Tensor, " values"],
    segments: Segments,
) -> None:
    """Make each segment of ``x`` that of ``raw`` over its length; where that is 0 or not finite ``x`` stays as it was.

    ``raw`` is used up.
    """
    over = (length / length).div_(length).to(x.dtype)  # NaN for 0 and infinity, too
    multiply(raw, over, segments, out=raw)
    if not segments.are_long:
        torch.where(raw.isnan(), x, raw, out=x)
        return
    fine = (over == over).to(x.dtype).unbind()
    parts = zip(x.split_with_sizes(segments.sizes), raw.split_with_sizes(segments.sizes), fine, strict=True)
    for old, new, whole in parts:  # isnan() and where() take three times as long
        old.lerp_(new.nan_to_num_(0.0, 0.0, 0.0), whole)

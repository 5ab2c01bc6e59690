"""The top singular triplets of linear maps, one warm step at a time."""

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectreg.linear_maps import LinearMap


class Triplets:
    """Estimates of the ``k`` largest singular values of many maps, and of their singular vectors.

    The vectors of all maps lie one after the other in two flat buffers, so that a step costs two products a weight
    and a handful of calls for all of them together.

    One step is ``u = Wv/|Wv|``, ``w = Wᵀu``, ``sigma = |w|``, ``v = w/sigma`` (Algorithm 1 of arXiv:1705.10941 with
    its missing normalisation). ``sigma`` never exceeds the true norm; the shortfall shrinks by ``(σ₂/σ₁)⁴`` a step.
    For a zero map sigma is 0, for one that is not finite NaN or infinity; ``v`` then stays as it was and ``u`` is 0.

    Args:
        maps: The maps; the weights themselves are handed to each step, in the same order.
        u, v: Of each map, ``blocks × outputs × k`` and ``blocks × inputs × k``; copied.
        sigma: Of each map, ``blocks × k``; copied.

    >>> from spectreg.linear_maps import MatrixMap
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
        self.u, self.v, self.sigma = (torch.cat([x.flatten() for x in parts]) for parts in (u, v, sigma))
        self.us: Sequence[Tensor] = self.u.split([x.numel() for x in u])
        self.vs = self.v.split([x.numel() for x in v])
        self.sigmas = self.sigma.split([x.numel() for x in sigma])
        self.u_segments = _segments([m.outputs for m in maps], [m.blocks for m in maps], self.k, self.u.device)
        self.v_segments = _segments([m.inputs for m in maps], [m.blocks for m in maps], self.k, self.u.device)

    def advance(self, weights: Sequence[Tensor], halves: int, from_u: bool = False) -> None:
        """Take ``halves`` half steps: u from v and v from u in turn, beginning with v from u if ``from_u``."""
        with full_precision(self.u):
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
        else:
            self._normalise(raw, adjoint)

    def _whole_step(self, weights: Sequence[Tensor]) -> None:
        both = [m.both(W, v) for m, W, v in zip(self.maps, weights, self.vs, strict=True)]
        u = [b[0] if b else m.forward(W, v) for b, m, W, v in zip(both, self.maps, weights, self.vs, strict=True)]
        self._normalise(u, adjoint=False)
        entries = zip(both, self.sigmas, self.maps, weights, self.us, strict=True)
        v = [b[1] / length if b else m.adjoint(W, x) for b, length, m, W, x in entries]
        self._normalise(v, adjoint=True)

    def _normalise(self, raw: list[Tensor], adjoint: bool) -> None:
        """Take σ and the unit u (or, if ``adjoint``, v) from the products ``raw``."""
        x, segments = (self.v, self.v_segments) if adjoint else (self.u, self.u_segments)
        flat = torch.cat(raw)
        self.sigma.copy_(lengths(flat, segments))
        x.copy_(normalised(flat, self.sigma, segments, x if adjoint else torch.zeros_like(x)))

    def _products(self, weights: Sequence[Tensor], adjoint: bool) -> list[Tensor]:
        """Wᵀu or Wv of each weight."""
        if adjoint:
            return [m.adjoint(W, u, self.k) for m, W, u in zip(self.maps, weights, self.us, strict=True)]
        return [m.forward(W, v, self.k) for m, W, v in zip(self.maps, weights, self.vs, strict=True)]

    def _rotate(self, raw: list[Tensor], these: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """From ``raw`` = W·others: orthonormal ``these``, and both turned so that theseᵀ·W·others is diagonal.

        The turn (Rayleigh and Ritz) separates singular values that lie close together, where orthogonalising alone
        would need as many steps as they are close.
        """
        for m, y, x, other, sigma in zip(self.maps, raw, these, others, self.sigmas, strict=True):
            Y, other3 = y.view(m.blocks, -1, self.k), other.view(m.blocks, -1, self.k)
            scale = Y.abs().amax((1, 2), keepdim=True)
            usable = (scale > 0) & scale.isfinite()
            Q, R = torch.linalg.qr(torch.where(usable, Y / scale, torch.eye(Y.shape[1], self.k).to(Y)))
            A, S, Bh = torch.linalg.svd(R)
            sigma.copy_(torch.where(usable[:, 0], S * scale[:, 0], scale[:, 0]).flatten())
            x.copy_(torch.where(usable, Q @ A, x.view_as(Y)).flatten())
            other.copy_(torch.where(usable, other3 @ Bh.mT, other3).flatten())

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
        with full_precision(self.u):
            for i, (G, u, rate) in enumerate(zip(targets, self._scaled_u(scale), rates, strict=True)):
                u, alpha = (u * rate, 1.0) if isinstance(rate, Tensor) else (u, rate)
                self._add_one(i, G, u, alpha)

    def _scaled_u(self, scale: Float[Tensor, " values"]) -> Sequence[Tensor]:
        scaled = self.u * scale.to(self.u.dtype).index_select(0, self.u_segments.owners)
        return scaled.split([x.numel() for x in self.us])

    def _add_one(self, i: int, G: Tensor, u: Tensor, alpha: float) -> None:
        self.maps[i].add_outer_(G, u, self.vs[i], self.k, alpha)


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast does not lower the products with ``x``."""
    return torch.autocast(x.device.type, enabled=False)


class Segments(NamedTuple):
    """The vectors of all blocks in a flat buffer: whose each element is, and where each begins."""

    owners: Int[Tensor, " elements"]
    offsets: Int[Tensor, " boundaries"]
    sizes: list[int]

    @property
    def are_long(self) -> bool:
        """Whether one call a segment costs less than an index for each element."""
        return len(self.owners) > 4096 * len(self.sizes)


def _segments(sizes: Sequence[int], blocks: Sequence[int], k: int, device: torch.device) -> Segments:
    index, first, each = [], 0, []
    for size, count in zip(sizes, blocks, strict=True):
        values = torch.arange(first, first + count * k, dtype=torch.int32).view(count, 1, k)
        index.append(values.expand(count, size, k).flatten())
        each += [size * k] * count
        first += count * k
    offsets = torch.tensor([0, *accumulate(each)])
    return Segments(torch.cat(index).to(device), offsets.to(device), each)


def lengths(x: Float[Tensor, " elements"], segments: Segments) -> Float[Tensor, " values"]:
    """The Euclidean length of each segment; squares are taken in float64, where float32 cannot overflow."""
    wide = x if x.device.type == "mps" else x.double()
    if segments.are_long:
        return torch.stack([torch.linalg.vector_norm(part) for part in wide.split(segments.sizes)]).to(x.dtype)
    return torch.segment_reduce(wide.square(), "sum", offsets=segments.offsets, unsafe=True).sqrt().to(x.dtype)


def normalised(
    x: Float[Tensor, " elements"],
    length: Float[Tensor, " values"],
    segments: Segments,
    otherwise: Float[Tensor, " elements"],
) -> Float[Tensor, " elements"]:
    """Each segment of ``x`` over its length; ``otherwise`` where that is zero or not finite."""
    if segments.are_long:
        usable = (length > 0) & length.isfinite()
        parts = zip(usable, x.split(segments.sizes), length, otherwise.split(segments.sizes), strict=True)
        return torch.cat([torch.where(fine, part / size, other) for fine, part, size, other in parts])
    each = length.index_select(0, segments.owners)
    return torch.where((each > 0) & each.isfinite(), x / each, otherwise)

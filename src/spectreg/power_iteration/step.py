"""The power step: the top singular vectors of many linear maps, followed one warm step at a time."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from itertools import accumulate, groupby
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectreg.linalg.eigenbasis import eigenbasis
from spectreg.maps.base import LinearMap
from spectreg.maps.factors import Target, Value
from spectreg.maps.matrix import ALONE

NEGLIGIBLE = 1e-13  # of the largest σ²: what is below is rounding


class Vectors:
    """Estimates of the ``m`` largest singular values of many maps, and of their singular vectors.

    A step is Algorithm 1 of arXiv:1705.10941 with its missing normalisation, for all maps together::

        u ← Wv / |Wv|                    half a step
        w ← Wᵀu,  σ ← |w|,  v ← w / σ    the other half
        G ← G + λφ'(σ)·uvᵀ               add_outer_

    With ``m`` > 1 u and v are matrices of ``m`` orthonormal columns, and dividing by the length becomes the step of
    Rayleigh and Ritz: with Y = WV, YᵀY = B s²Bᵀ (``m`` × ``m``; all blocks at once), U ← YB/s, V ← VB and σ ← s.

    A whole step takes Y = WV and Z = WᵀY in one go, so that a CPU reads W once and sharded weights send one message;
    what the lengths, or B and s, of both halves are follows from YᵀY and ZᵀZ, since WᵀU = ZB/s.

    σ never exceeds the true norm; with ``m`` = 1 the shortfall shrinks by (σ₂/σ₁)⁴ a step, else by (σ_{m+1}/σ₁)⁴. For a
    zero map σ is 0, for one that is not finite NaN or infinity; u and v then stay as they were.

    The vectors of all maps lie side by side in two tensors, ``U`` and ``V``, of ``m`` rows, so that a step takes two
    products a weight and a handful of calls for all of them together. ``other`` is a unit vector for each block that
    looks random.

    Args:
        maps: The maps; the weights themselves are handed to each step, in the same order.
        u, v: Of each map, ``blocks × outputs × m`` and ``blocks × inputs × m``; copied.
        sigma: Of each map, ``blocks × m``; copied.
        k: How many of the ``m`` enter the penalty.

    >>> from spectreg.maps.matrix import MatrixMap
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> vectors = Vectors([MatrixMap((2, 2))], [torch.zeros(1, 2, 1)], [torch.ones(1, 2, 1)], [torch.zeros(1, 1)])
    >>> vectors.advance([W], halves=40)
    >>> vectors.sigma
    tensor([[3.]])
    """

    def __init__(
        self, maps: Sequence[LinearMap], u: Sequence[Tensor], v: Sequence[Tensor], sigma: Sequence[Tensor], k: int = 1,
        other: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.maps, self.m, self.sigma = list(maps), sigma[0].shape[1], torch.cat(list(sigma))
        self.k = min(k, self.m)
        self.X = torch.cat([x.movedim(2, 0).flatten(1) for x in (*u, *v)], 1)
        outputs, inputs, blocks = zip(*[(m.outputs, m.inputs, m.blocks) for m in maps], strict=True)
        self.u_side = Side.of(outputs, blocks, self.m, self.X.device)
        self.v_side = Side.of(inputs, blocks, self.m, self.X.device)
        self.both_sides = Side.of(outputs + inputs, blocks + blocks, self.m, self.X.device)
        self.U, self.V = self.X.split([sum(self.u_side.widths), sum(self.v_side.widths)], 1)
        self.us: Sequence[Tensor] = self.U.split(self.u_side.widths, 1)
        self.vs: Sequence[Tensor] = self.V.split(self.v_side.widths, 1)
        self.sigmas = self.sigma.split(blocks)
        self.other = self._elsewhere() if other is None else other
        self.u_floor, v_floor = torch.zeros_like(self.U[:1]), self.other * torch.finfo(self.X.dtype).eps ** 2
        self.v_floor, self.floor = v_floor, torch.cat([self.u_floor, v_floor], 1)
        self.counts = [True] * len(self.maps)  # whether this process has a share in sums over all that hold a weight

    def _elsewhere(self) -> Float[Tensor, "1 columns"]:
        """A unit vector for each block that looks random: without a generator, which no graph could hold."""
        places = [torch.arange(1, n + 1, dtype=torch.float64, device="cpu") for n in self.v_side.widths]
        x = torch.cos(0.5 * (5**0.5 - 1) * torch.cat(places).square())[None].to(self.V.dtype).to(self.V.device)
        return x / self.v_side.spread(self.v_side.lengths(x).to(x.dtype))

    def look_elsewhere(self, share: float) -> None:
        """Add ``share`` of ``other`` to the last v of several: it finds what is large and apart from all of them.

        With the sign of v, which is arbitrary, so that nothing depends on that.
        """
        if self.m > 1:
            last = self.V[-1:]
            signs = torch.where(self.v_side.sums(last * self.other) < 0, -share, share)
            last.addcmul_(self.v_side.spread(signs), self.other)

    def advance(self, weights: Sequence[Value], halves: int, from_u: bool = False) -> None:
        """Take ``halves`` half steps: u from v and v from u in turn, beginning with v from u if ``from_u``.

        A part of v that fades would be 0 at last, and never be found where it belongs to a block of the weight that is
        apart from the rest and grows later. So a little of ``other`` is added to v, far below rounding.
        """
        if self.m > 1:
            self.V.add_(self.v_floor)
        with full_precision(self.U):
            while halves > 0:
                if halves > 1 and not from_u:
                    self.whole_step(weights)
                    halves -= 2
                else:
                    self.half_step(weights, from_u)
                    halves, from_u = halves - 1, not from_u

    def whole_step(self, weights: Sequence[Value]) -> None:
        """Both halves.

        V is divided by the last σ before: WᵀWV would be of the size σ², which float32 cannot hold where it can σ.
        """
        most = 1e30 if self.X.dtype == torch.float32 else 1e60
        scale = self.sigma[:, :1].clamp(1 / most, most).nan_to_num_(1.0).reciprocal_().t()
        raw = self.round_trips(weights, self.V * self.v_side.spread(scale))
        if self.m > 1:
            self._turn_both(raw, scale)
            return
        length = self.both_sides.lengths(raw)
        u_length, w_length = length.chunk(2, 1)
        w_length.nan_to_num_(inf, inf)  # inf - inf in Wᵀu: overflown, and put right at the next step by the σ of this
        torch.div(w_length, u_length.clamp_min_(torch.finfo(length.dtype).tiny), out=self.sigma.t())
        keep_unit(self.X, raw, length, self.both_sides, self.floor)

    def _turn_both(self, raw: Float[Tensor, "m columns"], scale: Float[Tensor, "1 blocks"]) -> None:
        """Rayleigh and Ritz for both halves: ``raw`` holds Y = WV · ``scale`` and Z = WᵀY."""
        Y, Z = raw.split([self.U.shape[1], self.V.shape[1]], 1)
        G, H = self.u_side.gram(Y, Y), self.v_side.gram(Z, Z)
        Y, Z = Y.nan_to_num(0.0, 0.0, 0.0), Z.nan_to_num(0.0, 0.0, 0.0)
        first = Ritz.of(G, stays=False)
        second = Ritz.of(first.new.mT @ H @ first.new, stays=True)
        largest = second.sigma[:, :1]
        fits = largest.isfinite() & (largest > 0)  # else Z over- or underflew: the next step has the right scale
        self.sigma.copy_(torch.where(fits, second.sigma, first.sigma / scale.t()))
        u_side, v_side = self.u_side, self.v_side
        self.U.copy_(u_side.combine(Y, first.new @ second.turn) + u_side.combine(self.U, first.old @ second.turn))
        self.V.copy_(v_side.combine(Z, first.new @ second.new) + v_side.combine(self.V, first.turn @ second.old))

    def half_step(self, weights: Sequence[Value], from_u: bool) -> None:
        """u from v, or v ``from_u``."""
        raw = torch.cat(list(self.products(weights, from_u)), 1)
        side, x, other_side, other = (self.u_side, self.U, self.v_side, self.V)
        if from_u:
            side, x, other_side, other = other_side, other, side, x
        if self.m == 1:
            length = side.lengths(raw)
            self.sigma.copy_(length.t())
            keep_unit(x, raw, length, side, self.v_floor if from_u else self.u_floor)
            return
        ritz = Ritz.of(side.gram(raw, raw), stays=from_u)
        self.sigma.copy_(ritz.sigma)
        x.copy_(side.combine(raw.nan_to_num(0.0, 0.0, 0.0), ritz.new) + side.combine(x, ritz.old))
        other.copy_(other_side.combine(other, ritz.turn))

    def products(self, weights: Sequence[Value], from_u: bool) -> list[Float[Tensor, "m _"]]:
        """Wᵀu or Wv of each weight."""
        if from_u:
            return [m.adjoint(W, u) for m, W, u in zip(self.maps, weights, self.us, strict=True)]
        return [m.forward(W, v) for m, W, v in zip(self.maps, weights, self.vs, strict=True)]

    def round_trips(self, weights: Sequence[Value], guess: Float[Tensor, "m _"]) -> Float[Tensor, "m _"]:
        """Wv of each weight, then WᵀWv of each, side by side."""
        parts = zip(self.maps, weights, guess.split(self.v_side.widths, 1), strict=True)
        u, w = zip(*[m.round_trip(W, v) for m, W, v in parts], strict=True)
        return torch.cat([*u, *w], 1)

    def shares(self, weights: Sequence[Value]) -> list[Float[Tensor, "m _"]]:
        """What this process has of Wv of each weight by itself; `whole` makes them whole."""
        return self.products(weights, from_u=False)

    def whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """Wv of each weight from the ``shares`` of all processes that hold it."""
        return list(shares)

    def summed(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The sum of these over all processes that hold the weights: of weights that are not sharded, they alone."""
        return list(parts)

    def add_outer_(
        self, targets: Sequence[Target | None], scale: Float[Tensor, "blocks k"], rates: Sequence[Any]
    ) -> None:
        """Add ``rate·Σ scale·uvᵀ`` over the first ``k`` pairs to each target in place; rates are numbers or tensors.

        A target that is None is passed over.
        """
        scaled = self.U[: self.k] * self.u_side.spread(scale.t())
        parts = zip(targets, scaled.split(self.u_side.widths, 1), self.vs, rates, strict=True)
        with full_precision(self.U):
            for i, (G, u, v, rate) in enumerate(parts):
                if G is None:
                    continue
                u, alpha = (u * rate, 1.0) if isinstance(rate, Tensor) else (u, rate)
                self.add_one_(i, G, u, v[: self.k], alpha)

    def add_one_(self, i: int, G: Target, u: Float[Tensor, "k _"], v: Float[Tensor, "k _"], alpha: float = 1.0) -> None:
        """Add alpha·Σ uvᵀ, for map ``i``, to ``G``."""
        self.maps[i].add_outer_(G, u, v, alpha)

    def residuals(self, weights: Sequence[Value]) -> list[Float[Tensor, ""]]:
        """‖Wᵀu − σv‖ of each map for u = Wv/|Wv| and σ = |Wv|, the largest of its ``k`` pairs; changes nothing."""
        probe = copy.copy(self)
        with full_precision(self.U):
            raw = torch.cat(self.products(weights, from_u=False), 1)
            sigma = self.u_side.lengths(raw).to(raw.dtype)
            own = self.u_side.spread(sigma)
            probe.us = torch.where(own > 0, raw / own, raw).split(self.u_side.widths, 1)
            w = torch.cat(probe.products(weights, from_u=True), 1)
        lengths = self.v_side.lengths(w - self.v_side.spread(sigma) * self.V)[: self.k].to(raw.dtype)
        return [part.amax() for part in lengths.split([m.blocks for m in self.maps], 1)]

    def stable_ranks(self, weights: Sequence[Value]) -> list[Float[Tensor, ""]]:
        """‖W‖_F²/σ² of each map; the least of blocks that are maps of their own."""
        ranks = []
        for m, squares, sigma in zip(self.maps, self.squares(weights), self.sigmas, strict=True):
            largest = sigma.amax(1).double().square()
            ranks.append(squares.sum() / largest.max() if m.norm == "max" else (squares / largest).min())
        return ranks

    def squares(self, weights: Sequence[Value]) -> list[Float[Tensor, " blocks"]]:
        """‖W‖_F² of each block."""
        return [m.squares(W) for m, W in zip(self.maps, weights, strict=True)]

    @contextmanager
    def only(self, which: Sequence[int]) -> Iterator["Vectors"]:
        """Those of some of the maps by themselves, to be stepped alone; of weights that are not sharded."""
        if len(which) == len(self.maps):
            yield self
            return
        maps = [self.maps[i] for i in which]
        us, vs = (
            [side[i].unflatten(1, (m.blocks, -1)).movedim(0, 2) for i, m in zip(which, maps, strict=True)]
            for side in (self.us, self.vs)
        )
        others = self.other.split(self.v_side.widths, 1)
        other = torch.cat([others[i] for i in which], 1)
        part = Vectors(maps, us, vs, [self.sigmas[i] for i in which], self.k, other)
        yield part
        for i, u, v, sigma in zip(which, part.us, part.vs, part.sigmas, strict=True):
            self.us[i].copy_(u)
            self.vs[i].copy_(v)
            self.sigmas[i].copy_(sigma)

    def at_rest(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Copies of u, v and σ of each map, in the shapes that they were given in."""
        blocks = [m.blocks for m in self.maps]
        sides = [
            [
                x.unflatten(1, (n, -1)).movedim(0, 2).clone(memory_format=torch.contiguous_format)
                for n, x in zip(blocks, side, strict=True)
            ]
            for side in (self.us, self.vs)
        ]
        return list(zip(*sides, [s.clone() for s in self.sigmas], strict=True))


class Side(NamedTuple):
    """How the vectors of all blocks lie side by side in ``U`` or ``V``.

    ``owners`` says which block each column belongs to, ``widths`` how many columns each map has, and ``runs`` how many
    blocks of one size to multiply at once: on an accelerator all that follow each other, which saves launches; on a CPU
    those of a map, since products of many small matrices fork.
    """

    owners: Int[Tensor, " columns"]
    offsets: Int[Tensor, " boundaries"]
    blocks: int
    widths: list[int]
    runs: list[tuple[int, int]]

    @classmethod
    def of(cls, sizes: Sequence[int], blocks: Sequence[int], m: int, device: torch.device) -> "Side":
        """Of ``blocks`` vectors of ``size`` numbers for each map; `sums` is of at most ``m`` rows then."""
        each = [size for size, count in zip(sizes, blocks, strict=True) for _ in range(count)]
        owners = torch.arange(len(each), device="cpu").repeat_interleave(torch.tensor(each, device="cpu"))
        offsets = torch.tensor([0, *accumulate(each * m)], device="cpu")
        widths = [size * count for size, count in zip(sizes, blocks, strict=True)]
        runs = list(zip(blocks, sizes, strict=True))
        if device.type != "cpu":
            runs = [(len(list(same)), size) for size, same in groupby(each)]
        return cls(owners.to(device), offsets.to(device), len(each), widths, runs)

    def sums(self, x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows blocks"]:
        """The sum of the numbers of each vector; of at most ``m`` rows."""
        offsets = self.offsets[: len(x) * self.blocks + 1]
        return torch.segment_reduce(x.view(-1), "sum", offsets=offsets, unsafe=True).view(len(x), self.blocks)

    def lengths(self, x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows blocks"]:
        """The length of each vector, in float64, where the squares of float32 cannot overflow."""
        return self.sums(_wide(x).square()).sqrt()

    def gram(self, x: Float[Tensor, "m columns"], y: Float[Tensor, "n columns"]) -> Float[Tensor, "blocks m n"]:
        """The products of the vectors of each block, in float64."""
        x, y = _wide(x), _wide(y)
        if self.at_once(y):
            return torch.stack([self.sums(row * y) for row in x.unbind()]).permute(2, 0, 1)
        pairs = zip(self.by_block(x), self.by_block(y), strict=True)
        return torch.cat([(a @ b.mT).view(-1, len(x), len(y)) for a, b in pairs])

    def combine(self, x: Float[Tensor, "m columns"], C: Float[Tensor, "blocks m n"]) -> Float[Tensor, "n columns"]:
        """The vectors of each block, as columns, times its matrix of ``C``."""
        if self.at_once(x):
            rows = zip(C.permute(1, 2, 0).to(x.dtype).unbind(), x.unbind(), strict=True)
            parts = [self.spread(c).mul_(row) for c, row in rows]
            return reduce(Tensor.add_, parts)
        blocks = zip(C.mT.to(x.dtype).split([count for count, _ in self.runs]), self.by_block(x), strict=True)
        products = [c[0] @ part if part.ndim == 2 else (c @ part).transpose(0, 1).flatten(1) for c, part in blocks]
        return torch.cat(products, 1)

    def at_once(self, x: Tensor) -> bool:
        """Whether to multiply a row with all blocks at once: of many small ones this takes less, and never forks."""
        few = len(x) * self.blocks < len(self.offsets) and 2 * len(x) < len(self.runs)
        return few and x.device.type == "cpu" and x.numel() <= ALONE

    def by_block(self, x: Float[Tensor, "m columns"]) -> list[Float[Tensor, "*blocks m size"]]:
        """The vectors of each block, those of a run in one tensor."""
        parts = zip(x.split([count * size for count, size in self.runs], 1), self.runs, strict=True)
        return [part if run[0] == 1 else part.unflatten(1, run).transpose(0, 1) for part, run in parts]

    def spread(self, values: Float[Tensor, "*rows blocks"]) -> Float[Tensor, "*rows columns"]:
        """A number for each block, as a number for each column."""
        return values.index_select(values.ndim - 1, self.owners)


class Ritz(NamedTuple):
    """What the products Y of a half step make of all vectors: X ← Y·``new`` + X·``old``, the others times ``turn``."""

    sigma: Float[Tensor, "blocks m"]
    new: Float[Tensor, "blocks m m"]
    old: Float[Tensor, "blocks m m"]
    turn: Float[Tensor, "blocks m m"]

    @classmethod
    def of(cls, G: Float[Tensor, "blocks m m"], stays: bool) -> "Ritz":
        """From G = YᵀY = B s²Bᵀ: ``new`` = B/s and ``turn`` = B.

        A column that is zero, which happens where the rank is below ``m``, has u = 0, and its v ``stays``: it is in the
        kernel, at right angles to all others. So do all vectors of a block that is zero or not finite.
        """
        whole = G.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)  # not finite where anything is not
        finite = whole.isfinite()
        squares, B = eigenbasis(torch.where(finite[..., None], G, 0.0))
        alive = squares > squares[:, :1] * NEGLIGIBLE + torch.finfo(torch.float32).tiny ** 2
        length = torch.where(alive, squares, 1.0).sqrt()
        kept = ~alive if stays else ~(alive | (whole > 0) & finite)
        sigma = torch.where(alive, length, 0.0)
        return cls(torch.where(finite, sigma, whole), B * (alive / length)[:, None], B * kept[:, None], B)


def keep_unit(
    x: Float[Tensor, "1 columns"],
    raw: Float[Tensor, "1 columns"],
    length: Float[Tensor, "1 blocks"],
    side: Side,
    floor: Float[Tensor, "1 columns"],
) -> None:
    """Make each vector of ``x`` that of ``raw`` over its length, plus ``floor``; one of length 0 or NaN stays."""
    over = length / length / length.clamp_min(torch.finfo(x.dtype).tiny)  # NaN for 0, infinity and NaN
    unit = torch.addcmul(floor, raw, side.spread(over.to(x.dtype)))
    torch.where(unit.isnan(), x, unit, out=x)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast does not lower the products with ``x``."""
    on = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # which has no float64

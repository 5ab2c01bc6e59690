"""Power steps on sharded weights (DTensors): products of local shards, vectors summed over the ranks."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from spectreg.maps.base import LinearMap
from spectreg.power_iteration.shards import is_sharded_by_columns, pieces_of
from spectreg.power_iteration.step import Vectors


class ShardedVectors(Vectors):
    """`Vectors` of weights that are sharded over one device mesh, or over meshes of which one contains the others.

    Every rank holds the whole (short) vectors, so that its state is that of an unsharded run; no weight is gathered.

    A whole step of weights sharded by rows (``fully_shard``, column-wise parallel layers, both together) takes one
    all-reduce for all of them: a rank has all of its rows of Wv, and its share of Wᵀ(Wv) without asking anybody. Where
    columns are sharded (row-wise parallel layers; transposed convolutions under ``fully_shard``) it takes two, and one
    cannot do: Wᵀu needs the sum over the ranks of their shares of u, and |Wᵀu|, which is σ, the sum over the ranks of
    what each then makes of that; a message sent before the first sum is known cannot hold the second. (It could wait
    for the next step's message, but then a look at σ or the state would have to talk to all ranks.)
    """

    def __init__(
        self,
        maps: Sequence[LinearMap],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        sigma: Sequence[Tensor],
        k: int,
        weights: Sequence[Any],
    ) -> None:
        super().__init__(maps, u, v, sigma, k)
        self.meeting = Meeting.of(weights)
        self.pieces = [pieces_of(m, W) for m, W in zip(maps, weights, strict=True)]
        self.counts = [self.meeting.counts(W) for W in weights]
        self.by_columns = any(is_sharded_by_columns(m, W) for m, W in zip(maps, weights, strict=True))

    def products(self, weights: Sequence[Any], from_u: bool) -> list[Tensor]:
        share, given = (self.adjoint_share, self.us) if from_u else (self.forward_share, self.vs)
        return self.summed([share(i, W, x) for i, (W, x) in enumerate(zip(weights, given, strict=True))])

    def round_trips(self, weights: Sequence[Any], guess: Tensor) -> Tensor:
        guesses = guess.split(self.v_side.widths, 1)
        u = [self.forward_share(i, W, v) for i, (W, v) in enumerate(zip(weights, guesses, strict=True))]
        if self.by_columns:
            u = self.summed(u)
        w = [self.adjoint_share(i, W, x) for i, (W, x) in enumerate(zip(weights, u, strict=True))]
        return torch.cat([*u, *self.summed(w)] if self.by_columns else self.summed([*u, *w]), 1)

    def shares(self, weights: Sequence[Any]) -> list[Tensor]:
        """Of weights sharded by rows this rank's rows of Wv, without a message; where columns are, the whole."""
        if self.by_columns:
            return self.products(weights, from_u=False)
        return [self.forward_share(i, W, v) for i, (W, v) in enumerate(zip(weights, self.vs, strict=True))]

    def whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """All rows, in one message."""
        return list(shares) if self.by_columns else self.summed(shares)

    def add_one_(self, i: int, G: Any, u: Tensor, v: Tensor, alpha: float = 1.0) -> None:
        """Add alpha·Σ uvᵀ, for map ``i``, to this rank's shard of ``G``."""
        m, local = self.maps[i], _local(G)
        u, v = u.unflatten(1, (m.blocks, -1)), v.unflatten(1, (m.blocks, -1))
        for p in self.pieces[i]:
            p.map.add_outer_(local[p.local], u[:, p.block, p.rows], v[:, p.block, p.columns], alpha)

    def squares(self, weights: Sequence[Any]) -> list[Tensor]:
        shares = [torch.zeros(m.blocks, dtype=torch.float64, device=self.U.device) for m in self.maps]
        for i, (W, share) in enumerate(zip(weights, shares, strict=True)):
            for p in self.pieces[i] if self.counts[i] else ():
                share[p.block] += p.map.squares(_local(W)[p.local])[0]
        return self.summed(shares)

    def forward_share(self, i: int, W: Tensor, v: Float[Tensor, "m _"]) -> Float[Tensor, "m _"]:
        """This rank's share of Wv."""
        m, local, v = self.maps[i], _local(W), v.unflatten(1, (self.maps[i].blocks, -1))
        u = v.new_zeros(len(v), m.blocks, m.outputs)
        for p in self.pieces[i] if self.counts[i] else ():
            u[:, p.block, p.rows] += p.map.forward(local[p.local], v[:, p.block, p.columns])
        return u.flatten(1)

    def adjoint_share(self, i: int, W: Tensor, u: Float[Tensor, "m _"]) -> Float[Tensor, "m _"]:
        """This rank's share of Wᵀu."""
        m, local, u = self.maps[i], _local(W), u.unflatten(1, (self.maps[i].blocks, -1))
        v = u.new_zeros(len(u), m.blocks, m.inputs)
        for p in self.pieces[i] if self.counts[i] else ():
            v[:, p.block, p.columns] += p.map.adjoint(local[p.local], u[:, p.block, p.rows])
        return v.flatten(1)

    def summed(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The sum over the ranks of all of these, in one message."""
        message = torch.cat([x.flatten() for x in parts])
        dist.all_reduce(message, group=self.meeting.group)
        return [x.view_as(part) for x, part in zip(message.split([p.numel() for p in parts]), parts, strict=True)]


class Meeting(NamedTuple):
    """Where all shards come together: a process group, and the one dimension of the mesh or the ranks it spans."""

    group: Any
    dimension: int | None
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[Any]) -> "Meeting":
        """That of ``weights``, of whose meshes the largest contains the others."""
        meshes = [W.device_mesh for W in weights]
        largest = max(meshes, key=lambda mesh: mesh.size())
        ranks = tuple(largest.mesh.flatten().tolist())
        dimensions = set().union(*map(_sharded_dimensions, weights))
        if all(mesh == largest for mesh in meshes) and len(dimensions) <= 1:
            dimension = min(dimensions, default=0)
            return cls(largest.get_group(dimension), dimension, ranks)
        whole = len(ranks) == dist.get_world_size()
        return cls(dist.group.WORLD if whole else _group_of(ranks, dist.group.WORLD), None, ranks)

    def counts(self, W: Any) -> bool:
        """Whether this rank's shard enters the sum: of the ranks that hold the same one, only the first does."""
        mesh, coordinate = W.device_mesh, W.device_mesh.get_coordinate()
        summed = range(mesh.ndim) if self.dimension is None else [self.dimension]
        first = all(coordinate[d] == 0 for d in summed if d not in _sharded_dimensions(W))
        return first and (self.dimension is not None or self.ranks[0] in _ranks(W))


def meeting_ranks(W: Any, weights: Sequence[Any]) -> tuple[int, ...]:
    """The ranks of the largest mesh of ``weights`` that contains that of ``W``: weights alike in it share a message."""
    own = set(_ranks(W))
    return max((ranks for ranks in map(_ranks, weights) if own <= set(ranks)), key=len)


@cache
def _group_of(ranks: tuple[int, ...], world: Any) -> Any:
    return dist.new_group(list(ranks), use_local_synchronization=True)


def _sharded_dimensions(W: Any) -> set[int]:
    return {d for d, placement in enumerate(W.placements) if not placement.is_replicate()}


def _ranks(W: Any) -> tuple[int, ...]:
    return tuple(W.device_mesh.mesh.flatten().tolist())


def _local(W: Tensor) -> Tensor:
    return W.to_local() if isinstance(W, DTensor) else W


def check_ranks(vectors: Mapping[str, Tensor], group: Any = None) -> None:
    """Raise unless these tensors are the same on every rank of ``group``.

    Raises:
        RuntimeError: Names the first rank that differs from rank 0, and the tensors in which it does.
    """
    bits = [x.double().flatten() for x in vectors.values()]
    digests = torch.stack([(x * torch.cos(torch.arange(len(x), device=x.device))).sum() for x in bits])
    everyone = [torch.empty_like(digests) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, digests, group=group)
    for rank, values in enumerate(everyone):
        same = (values == everyone[0]) | (values.isnan() & everyone[0].isnan())
        names = [name for name, fine in zip(vectors, same.tolist(), strict=True) if not fine]
        if names:
            raise RuntimeError(
                f"rank {rank} differs from rank 0 in {', '.join(names[:8])}. Build the model alike on every rank, give "
                "the regularizer the same seed, and call it the same number of times everywhere."
            )

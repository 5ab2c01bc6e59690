"""Power steps on sharded weights (DTensors): products of local shards, vectors summed over the ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from spectreg.linear_maps import LinearMap, MatrixMap
from spectreg.power import Triplets, lengths, normalised


class Piece(NamedTuple):
    """The part of one block that a rank holds: where it is in its shard, and which rows and columns it covers."""

    local: tuple[slice, ...]
    block: int
    rows: slice
    columns: slice
    map: MatrixMap


class ShardedTriplets(Triplets):
    """`Triplets` of weights that are sharded over one device mesh.

    Every rank holds the whole (short) vectors, so that its state is that of an unsharded run; no weight is gathered.
    A whole step of weights sharded by rows (``fully_shard``, column-wise parallel layers) takes one all-reduce for
    all of them; where columns are sharded (row-wise parallel layers), and for k > 1, it takes two.
    """

    def __init__(
        self,
        maps: Sequence[LinearMap],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        sigma: Sequence[Tensor],
        weights: Sequence[Tensor],
    ) -> None:
        super().__init__(maps, u, v, sigma)
        dtensors: list[Any] = list(weights)
        self.mesh = dtensors[0].device_mesh
        self.pieces = [pieces_of(m, W) for m, W in zip(maps, dtensors, strict=True)]
        self.by_columns = [_sharded_by_columns(m, W) for m, W in zip(maps, dtensors, strict=True)]
        sharded = [{d for d, p in enumerate(W.placements) if not p.is_replicate()} for W in dtensors]
        self.dimensions = sorted(set().union(*sharded))
        here = self.mesh.get_coordinate()
        self.counts = [all(here[d] == 0 for d in self.dimensions if d not in own) for own in sharded]

    def _add_one(self, i: int, G: Tensor, u: Tensor, alpha: float) -> None:
        m, local = self.maps[i], _local(G)
        u3, v3 = u.view(m.blocks, -1, self.k), self.vs[i].view(m.blocks, -1, self.k)
        for p in self.pieces[i]:
            piece_u, piece_v = u3[p.block, p.rows].flatten(), v3[p.block, p.columns].flatten()
            p.map.add_outer_(local[p.local], piece_u, piece_v, self.k, alpha)

    def _whole_step(self, weights: Sequence[Tensor]) -> None:
        """u from v and v from u without normalising between, so that one sum over the ranks serves both."""
        u = [self._forward(i, W, v) for i, (W, v) in enumerate(zip(weights, self.vs, strict=True))]
        if any(self.by_columns):
            u = self._summed(u)
        # Scaled by hand: Wᵀ(Wv) is of the size σ², which float32 cannot hold where it can hold σ.
        scales = [_largest(x) for x in u]
        v = [
            self._adjoint(i, W, (x / s).to(self.u.dtype))
            for i, (W, x, s) in enumerate(zip(weights, u, scales, strict=True))
        ]
        wide = [x.double() * s for x, s in zip(v, scales, strict=True)]
        if any(self.by_columns):
            wide = self._summed(wide)
        else:
            both = self._summed([*u, *wide])
            u, wide = both[: len(u)], both[len(u) :]
        u_flat, v_flat = torch.cat([x.double() for x in u]), torch.cat(wide)
        u_length = lengths(u_flat, self.u_segments)
        v_length = lengths(v_flat, self.v_segments)
        self.sigma.copy_(torch.where(u_length == 0, u_length, v_length / u_length))
        self.u.copy_(normalised(u_flat, u_length, self.u_segments, torch.zeros_like(u_flat)))
        self.v.copy_(normalised(v_flat, v_length, self.v_segments, self.v.double()))

    def _products(self, weights: Sequence[Tensor], adjoint: bool) -> list[Tensor]:
        product, given = (self._adjoint, self.us) if adjoint else (self._forward, self.vs)
        parts = [product(i, W, x) for i, (W, x) in enumerate(zip(weights, given, strict=True))]
        return [x.to(self.u.dtype) for x in self._summed(parts)]

    def _squares(self, weights: Sequence[Tensor]) -> list[Tensor]:
        shares = [torch.zeros(m.blocks, dtype=torch.float64, device=self.u.device) for m in self.maps]
        for i, (W, share) in enumerate(zip(weights, shares, strict=True)):
            for p in self.pieces[i] if self.counts[i] else ():
                share[p.block] += p.map.squares(_local(W)[p.local])[0]
        return self._summed(shares)

    def _forward(self, i: int, W: Tensor, v: Tensor) -> Tensor:
        """This rank's share of Wv."""
        m, local = self.maps[i], _local(W)
        u = v.new_zeros(m.blocks, m.outputs, self.k)
        for p in self.pieces[i] if self.counts[i] else ():
            part = v.view(m.blocks, -1, self.k)[p.block, p.columns].flatten()
            u[p.block, p.rows] += p.map.forward(local[p.local], part, self.k).view(-1, self.k)
        return u.flatten()

    def _adjoint(self, i: int, W: Tensor, u: Tensor) -> Tensor:
        """This rank's share of Wᵀu."""
        m, local = self.maps[i], _local(W)
        v = u.new_zeros(m.blocks, m.inputs, self.k)
        for p in self.pieces[i] if self.counts[i] else ():
            part = u.view(m.blocks, -1, self.k)[p.block, p.rows].flatten()
            v[p.block, p.columns] += p.map.adjoint(local[p.local], part, self.k).view(-1, self.k)
        return v.flatten()

    def _summed(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The sum over the ranks of all of these, in one message."""
        message = torch.cat([x.double() for x in parts])
        for dimension in self.dimensions:
            dist.all_reduce(message, group=self.mesh.get_group(dimension))
        return list(message.split([x.numel() for x in parts]))


def pieces_of(m: LinearMap, W: Any) -> list[Piece]:
    """Which parts of which blocks of ``W`` this rank holds.

    Raises:
        NotImplementedError: The map is not a matrix view, or a dimension of the kernel is sharded.
    """
    _check_divisible(m, W)
    assert isinstance(m, MatrixMap)
    shape, offset = compute_local_shape_and_global_offset(W.shape, W.device_mesh, W.placements)
    if 0 in shape:
        return []
    row_dim, column_dim = (1, 0) if m.layout == "columns" else (0, 1)
    unit = m.inputs // m.shape[column_dim]
    columns = slice(offset[column_dim] * unit, (offset[column_dim] + shape[column_dim]) * unit)
    first, last, pieces = offset[row_dim], offset[row_dim] + shape[row_dim], []
    for block in range(first // m.outputs, (last - 1) // m.outputs + 1):
        begin, end = max(first, block * m.outputs), min(last, (block + 1) * m.outputs)
        local = slice(begin - first, end - first)
        where = (slice(None), local) if row_dim == 1 else (local,)
        size = [end - begin if d == row_dim else s for d, s in enumerate(shape)]
        rows = slice(begin - block * m.outputs, end - block * m.outputs)
        pieces.append(Piece(where, block, rows, columns, replace(m, shape=tuple(size), blocks=1)))
    return pieces


def _check_divisible(m: LinearMap, W: Any) -> None:
    if not isinstance(m, MatrixMap) or m.layout == "transposed":
        raise NotImplementedError(
            f"a sharded weight of shape {tuple(W.shape)} is taken for a {type(m).__name__}"
            f"{' of a transposed convolution' if isinstance(m, MatrixMap) else ''}: only matrix views of linear, "
            "recurrent, attention and (plain) convolution weights can be sharded. Leave it out with select."
        )
    for placement in W.placements:
        if placement.is_partial() or (placement.is_shard() and placement.dim > 1):
            raise NotImplementedError(
                f"a weight of shape {tuple(W.shape)} is placed {placement}: use Shard(0) or Shard(1)."
            )


def _sharded_by_columns(m: LinearMap, W: Any) -> bool:
    column_dim = 0 if getattr(m, "layout", "") == "columns" else 1
    return any(getattr(p, "dim", None) == column_dim for p in W.placements)


def _largest(x: Tensor) -> Tensor:
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    return torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))


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
    for rank, theirs in enumerate(everyone):
        same = (theirs == everyone[0]) | (theirs.isnan() & everyone[0].isnan())
        names = [name for name, fine in zip(vectors, same.tolist(), strict=True) if not fine]
        if names:
            raise RuntimeError(
                f"rank {rank} differs from rank 0 in {', '.join(names[:8])}. Build the model alike on every rank, give "
                "the regularizer the same seed, and call it the same number of times everywhere."
            )

"""The parts of a weight's blocks that one rank holds of a sharded weight, each as a linear map of its own."""

from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from spectreg.maps.base import LinearMap
from spectreg.maps.convolution import OperatorMap
from spectreg.maps.matrix import MatrixMap


class Piece(NamedTuple):
    """Where a part lies in the shard, and which rows and columns of which block it covers."""

    local: tuple[slice, ...]
    block: int
    rows: slice
    columns: slice
    map: LinearMap


def pieces_of(m: LinearMap, W: Any) -> list[Piece]:
    """Which parts of which blocks of the DTensor ``W`` this rank holds.

    Raises:
        NotImplementedError: ``W`` is a partial sum, or a dimension of the kernel is sharded.
    """
    _check_placements(W)
    shape, offset = compute_local_shape_and_global_offset(W.shape, W.device_mesh, W.placements)
    if 0 in shape:
        return []
    cut = 1 if _layout(m) == "columns" else 0  # the dimension in which the blocks follow each other
    across = slice(offset[1 - cut], offset[1 - cut] + shape[1 - cut])
    size, first, last = W.shape[cut] // _blocks(m), offset[cut], offset[cut] + shape[cut]
    pieces = []
    for block in range(first // size, (last - 1) // size + 1):
        begin, end = max(first, block * size), min(last, (block + 1) * size)
        local = (slice(None),) * cut + (slice(begin - first, end - first),)
        local_shape = tuple(end - begin if d == cut else s for d, s in enumerate(shape))
        along = slice(begin - block * size, end - block * size)
        pieces.append(_piece(m, local, block, along, across, local_shape))
    return pieces


def is_sharded_by_columns(m: LinearMap, W: Any) -> bool:
    """Whether a rank holds some columns of the map only, so that its share of Wv is a term of a sum."""
    column_dim = {"columns": 0, "transposed": 0, "stack": 2}.get(_layout(m), 1)
    return any(getattr(p, "dim", None) == column_dim for p in W.placements)


def _piece(
    m: LinearMap, local: tuple[slice, ...], block: int, along: slice, across: slice, shape: tuple[int, ...]
) -> Piece:
    """The part of ``block`` that is ``along`` the dimension of the blocks and ``across`` the other one."""
    rows, columns = (across, along) if _layout(m) in ("transposed", "stack") else (along, across)
    if isinstance(m, OperatorMap):
        part = m.part(slice(block, block + 1), rows, columns)
        return Piece(local, 0, part.rows, part.columns, part.map)
    assert isinstance(m, MatrixMap)
    unit = prod(shape[2:])
    columns = slice(columns.start * unit, columns.stop * unit)
    return Piece(local, block, rows, columns, replace(m, shape=shape, blocks=1))


def _blocks(m: LinearMap) -> int:
    return m.arguments[-1] if isinstance(m, OperatorMap) else m.blocks


def _layout(m: LinearMap) -> str:
    if isinstance(m, OperatorMap):
        return "transposed" if m.arguments[3] else "rows"
    return getattr(m, "layout", "rows")


def _check_placements(W: Any) -> None:
    for placement in W.placements:
        if placement.is_partial() or (placement.is_shard() and placement.dim > 1):
            raise NotImplementedError(
                f"a weight of shape {tuple(W.shape)} is placed {placement}: use Shard(0) or Shard(1)."
            )

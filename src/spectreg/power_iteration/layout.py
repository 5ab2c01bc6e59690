"""How a weight is stored: what has to be the same for weights to be stepped together."""

import sys
from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter

from spectreg.maps.factors import Factors, Value


def is_sharded(W: Value) -> bool:
    """Whether ``W`` is a DTensor; whose module, slow to import, is loaded where there is one."""
    if type(W) is Parameter:
        return False
    if isinstance(W, Factors):
        return any(map(is_sharded, W))
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(W, module.DTensor)


def layout_of(W: Any) -> tuple[Any, ...]:
    """How ``W`` is stored; where that changes, groups have to be made anew."""
    if isinstance(W, Factors):
        return tuple(map(layout_of, W))
    mesh, placements = (W.device_mesh, W.placements) if is_sharded(W) else (None, None)
    return W.device, W.dtype, W.requires_grad, mesh, placements, W.shape, type(W)


def mesh_of(W: Any) -> tuple[tuple[int, ...], frozenset[int]]:
    """The shape of the mesh of the DTensor ``W``, and which ranks are in it."""
    return tuple(W.device_mesh.shape), frozenset(W.device_mesh.mesh.flatten().tolist())


def is_partly_gathered(W: Any) -> bool:
    """Whether the DTensor ``W`` lies as fully_shard(reshard_after_forward=<int>) has it between its passes."""
    placements = W.placements
    two = len(placements) == 2 and placements[0].is_replicate() and placements[1].is_shard()
    return two and W.device_mesh.mesh_dim_names is None


def alike(weights: Sequence[Value]) -> list[tuple[Any, ...]]:
    """Of each weight what those in a group share: device, precision, whether it is trained, and on which ranks."""
    ranks: list[Any] = [None] * len(weights)
    if any(is_sharded(W) for W in weights):
        from spectreg.power_iteration.sharded import meeting_ranks

        sharded = [W for W in weights if is_sharded(W)]
        ranks = [meeting_ranks(W, sharded) if is_sharded(W) else None for W in weights]
    return [(W.device, W.dtype, W.requires_grad, where) for W, where in zip(weights, ranks, strict=True)]

"""How a weight is stored: what has to be the same for weights to be stepped together."""

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter


def is_sharded(W: Tensor) -> bool:
    """Whether ``W`` is a DTensor; whose module, slow to import, is loaded where there is one."""
    if type(W) is Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(W, module.DTensor)


def layout_of(W: Any) -> tuple[Any, ...]:
    """How ``W`` is stored; where that changes, groups have to be made anew."""
    mesh, placements = (W.device_mesh, W.placements) if is_sharded(W) else (None, None)
    return W.device, W.dtype, W.requires_grad, mesh, placements, W.shape, type(W)


def alike(weights: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Of each weight what those in a group share: device, precision, whether it is trained, and on which ranks."""
    ranks: list[Any] = [None] * len(weights)
    if any(is_sharded(W) for W in weights):
        from spectreg.power_iteration.sharded import meeting_ranks

        sharded = [W for W in weights if is_sharded(W)]
        ranks = [meeting_ranks(W, sharded) if is_sharded(W) else None for W in weights]
    return [(*layout_of(W)[:3], where) for W, where in zip(weights, ranks, strict=True)]

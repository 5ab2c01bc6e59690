"""Bringing the norm of a weight to a number by scaling it; of a product by scaling its factors."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.linalg.directions import gaussian_like
from spectreg.linalg.lanczos import Goal
from spectreg.linalg.products import largest_singular_value
from spectreg.maps.factors import Factors
from spectreg.maps.product import ProductMap
from spectreg.power_iteration.layout import is_sharded
from spectreg.weights.selection import Weight


def scale_(w: Weight, W: Any, by: Float[Tensor, " some"]) -> None:
    """Multiply each block of the weight by its number, or all by one."""
    if not is_sharded(W):
        w.map.scale_(W, by)
    elif len(by) == 1:
        W.mul_(by[0].to(W.dtype))
    else:
        from spectreg.power_iteration.shards import pieces_of

        for p in pieces_of(w.map, W):
            p.map.scale_(W.to_local()[p.local], by[p.block, None])


class Rests:
    """What a cap has to know of products that are sums with a frozen term, such as W + sBA: the norm of that term.

    N + fP has at most the norm c > ‖N‖ for f = (c − ‖N‖)/(σ − ‖N‖), since the norm is convex in f.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, float]] = {}

    def factor(self, w: Weight, W: Factors, cap: float, top: Tensor) -> Tensor | None:
        """By what to multiply the terms that are trained; None where nothing is frozen.

        Raises:
            ValueError: The frozen term is above the cap by itself.
        """
        assert isinstance(w.map, ProductMap)
        frozen = w.map.part(W, scalable=False)
        if frozen is None:
            return None
        norm = self._norm(w.name, frozen, W)
        if norm >= cap:
            raise ValueError(
                f"the cap of {w.name!r} is {cap:.4g}, but what is frozen of it has the norm {norm:.4g}: no scaling of "
                "the rest brings the sum below. Give a larger cap, or cap the update by itself."
            )
        return torch.where(top > cap, (cap - norm) / (top - norm), 1.0)

    def _norm(self, name: str, frozen: ProductMap, W: Factors) -> float:
        frozen_ones = [x for x in W if x.ndim and not x.requires_grad]
        lengths = [float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in frozen_ones]  # .data has no version
        now = [(id(x), x._version) for x in frozen_ones], lengths, [float(x) for x in W if not x.ndim]
        before, norm = self._known.get(name, (None, 0.0))
        if before != now:
            start = gaussian_like(torch.empty(3, 1, frozen.inputs, dtype=torch.float64, device=W.device),
                                  torch.Generator().manual_seed(0))  # fmt: skip
            norm = largest_singular_value(
                lambda x: frozen.forward(W, x.flatten(1)),
                lambda y: frozen.adjoint(W, y.flatten(1)).unflatten(1, (1, -1)),
                start,
                Goal(1, 1e-5, 400),
            ).values[0]
            self._known[name] = now, norm
        return norm


def refuse_unscalable(w: Weight, W: Any, retract: bool) -> None:
    """Refuse products no factor of which can be scaled, and sums with a frozen term where σ is to be met exactly."""
    if not isinstance(w.map, ProductMap):
        return
    if w.map.part(W, scalable=True) is None:
        raise ValueError(
            f"no factor of the product {w.name!r} that could be scaled is trained: a normalization without its own γ "
            "(affine=False, or frozen) would follow a scaled weight with its variance. Penalize it instead."
        )
    if retract and w.map.part(W, scalable=False) is not None:
        raise ValueError(
            f"retract=True scales {w.name!r} until σ is c, and part of that sum is frozen: leave retract out."
        )

"""Weights whose spectral norm is held at or below a cap by scaling them after each step of the optimizer."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectreg.following import Following
from spectreg.optimizers import after_steps
from spectreg.power_iteration.krylov import follow
from spectreg.power_iteration.layout import is_sharded
from spectreg.power_iteration.refusals import check_number, refuse_computed, refuse_gathered
from spectreg.power_iteration.state import Group, State
from spectreg.weights.kinds import InputSize
from spectreg.weights.patterns import Patterns
from spectreg.weights.selection import Select, Weight, named_weights

Cap = float | int | Literal["shape"]


class SpectralNormCap(Following):
    """Holds σ of each weight at or below a cap: W ← W·min(1, c/σ) after each step; or at it: W ← W·c/σ.

    σ is found to within a thousandth, also after the large steps of Muon or AdamW, by Rayleigh and Ritz on the followed
    vectors and their next ``depth`` products. The whole weight is scaled, so its singular vectors and the ratios of its
    singular values stay: taking σ − c off the largest alone would leave many of them equal to c, and no few products
    tell which of these the next step raises most (docs/use.md).

    Args:
        model: Its weights are capped (`spectreg.named_weights` says which).
        cap: c: a number, ``"shape"`` for √(d_out/d_in) of each weight, or a mapping from name patterns to these; a
            weight that no pattern matches is left alone.
        factor: Multiplies the cap.
        retract: Whether to scale up as well, so that σ is c after every step.
        map: As of `spectreg.SpectralNormRegularizer`.
        input_size: As there.
        select: As there.
        embeddings: As there.
        tracked: How many vectors follow the largest singular values of each weight.
        depth: How many products with WᵀW these are joined by at each step.
        warmup: Power steps at the first call.
        seed: Of the first vectors.

    Raises:
        ValueError: A setting is out of range or fits no weight; a weight is in half precision.

    >>> model = nn.Linear(3, 3, bias=False)
    >>> _ = nn.init.eye_(model.weight).data.mul_(4)
    >>> cap = SpectralNormCap(model, 2.0)
    >>> cap.apply()
    >>> round(torch.linalg.matrix_norm(model.weight, 2).item(), 4)
    2.0
    """

    NAME = "cap"

    def __init__(
        self,
        model: nn.Module,
        cap: Cap | Mapping[str, Cap],
        *,
        factor: float | int = 1.0,
        retract: bool = False,
        map: str | int | Mapping[str, str | int] = "matrix",
        input_size: InputSize | Mapping[str, InputSize] | None = None,
        select: Select | None = None,
        embeddings: bool = False,
        tracked: int = 8,
        depth: int = 2,
        warmup: int = 15,
        seed: int = 0,
    ) -> None:
        check_number("factor", factor, lambda x: isfinite(x) and x > 0, "a finite number above 0")
        check_number("tracked", tracked, lambda x: x >= 1 and x % 1 == 0, "a whole number from 1")
        check_number("depth", depth, lambda x: x >= 1 and x % 1 == 0, "a whole number from 1")
        check_number("warmup", warmup, lambda x: x >= 0 and x % 1 == 0, "a whole number from 0")
        patterns = Patterns("cap", cap)
        weights = named_weights(model, select, map, input_size, embeddings)
        caps = {w.name: patterns.get(w.name) for w in weights}
        patterns.check_all_used(list(caps))
        self.weights: list[Weight] = [w for w in weights if caps[w.name] is not None]
        self.caps = {w.name: factor * _number(w, caps[w.name]) for w in self.weights}
        self.cap, self.retract, self.depth = cap, retract, int(depth)
        self._state = State(
            self.weights, k=int(tracked), tracked=int(tracked), seed=seed, halves=2, every=1, warmup=int(warmup),
            keeps_start=False,
        )  # fmt: skip
        _refuse_half(self.weights)

    @torch.no_grad()
    def apply(self) -> None:
        """Cap every weight that is trained, now: by hand, after each ``optimizer.step()``.

        Raises:
            ValueError: A weight is under a parametrization, or in half precision.
            RuntimeError: A sharded weight is gathered.
        """
        self._apply(None)

    def attach(self, *optimizers: Any) -> "SpectralNormCap":
        """Act after every ``optimizer.step()``, whoever calls it, until ``detach``; of wrappers on the one inside.

        Raises:
            TypeError: One of these is no optimizer.
            RuntimeError: It is attached already.
            ValueError: A weight is in none of the optimizers, the step of one runs no hooks, or one keeps averages of
                its own that would not be capped.
        """
        self._attach(lambda: after_steps(optimizers, self.weights, self._apply))
        return self

    def __repr__(self) -> str:
        return (
            f"SpectralNormCap({len(self.weights)} weights, cap={self.cap}{', retract' if self.retract else ''}"
            f"{', attached' if self._attachment else ''})"
        )

    @torch.no_grad()
    def _apply(self, lane: int | None) -> None:
        refuse_computed(self.weights)
        groups = self._state.trained(lane)
        refuse_gathered(self._state.gathered)
        _refuse_half(self.weights)
        for group, weights in groups:
            follow(group.vectors, weights, self.depth)
            self._scale(group, weights)
            group.calls += 1

    def _scale(self, group: Group, weights: list[Tensor]) -> None:
        for w, W, s in zip(group.members, weights, group.vectors.sigmas, strict=True):
            top = s[:, 0].amax(0, keepdim=True) if w.map.norm == "max" else s[:, 0]
            factor = self.caps[w.name] / top
            factor = torch.where((top > 0) & top.isfinite(), factor if self.retract else factor.clamp_max(1.0), 1.0)
            s.mul_(factor[:, None])
            if len(factor) == 1:
                W.mul_(factor[0].to(W.dtype))
            else:
                _scale_blocks(w, W, factor.to(W.dtype))


def _scale_blocks(w: Weight, W: Tensor, factor: Tensor) -> None:
    if is_sharded(W):
        from spectreg.power_iteration.shards import pieces_of

        local = W.to_local()  # type: ignore[attr-defined]
        for p in pieces_of(w.map, W):
            local[p.local].mul_(factor[p.block])
        return
    if getattr(w.map, "layout", "rows") == "columns":
        W.unflatten(1, (len(factor), -1)).mul_(factor[:, None])
    else:
        parts = W.unflatten(0, (len(factor), -1))
        parts.mul_(factor.view(-1, *[1] * (parts.ndim - 1)))


def _number(w: Weight, cap: Any) -> float:
    if cap == "shape":
        return float((w.map.outputs / w.map.inputs) ** 0.5)
    check_number(f"cap of {w.name!r}", cap, lambda x: isfinite(x) and x > 0, "a finite number above 0, or 'shape'")
    return float(cap)


def _refuse_half(weights: list[Weight]) -> None:
    for w in weights:
        if w.tensor.dtype.itemsize < 4 and w.tensor.requires_grad:
            raise ValueError(
                f"weight {w.name!r} is {w.tensor.dtype}, whose rounding is coarser than the cap's thousandth: keep the "
                "weights that the optimizer steps in float32, or leave this one out with select."
            )

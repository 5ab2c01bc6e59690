"""Weights whose spectral norm is held at or below a cap after each step of the optimizer, by scaling or clipping."""

from collections.abc import Container, Hashable, Mapping, Sequence
from math import isfinite
from typing import Any, Literal

import torch
from torch import nn

from spectreg.following import Following
from spectreg.maps.factors import Factors, Value, tensors_of
from spectreg.maps.product import ProductMap
from spectreg.optimizers import after_steps
from spectreg.power_iteration.clipping import clip_, refuse_uncut
from spectreg.power_iteration.krylov import follow
from spectreg.power_iteration.layout import is_sharded
from spectreg.power_iteration.refusals import (
    check_number,
    check_seed,
    place_in_memory,
    refuse_computed,
    refuse_gathered,
    refuse_strangers,
)
from spectreg.power_iteration.scaling import Rests, refuse_unscalable, scale_
from spectreg.power_iteration.state import Group, State
from spectreg.power_iteration.step import Vectors, full_precision
from spectreg.products.named import weights_of
from spectreg.weights.kinds import InputSize
from spectreg.weights.patterns import Patterns
from spectreg.weights.selection import Select, Weight

Cap = float | int | Literal["shape"]
FAR, GROWN = 0.75, 1.002  # shares of the cap and of the last σ up to which a power step is enough
ELSEWHERE = 1.0  # as much of another vector is added to the last: what is large and apart from all is found by it


class SpectralNormCap(Following):
    """Holds σ of each weight at or below a cap after each step, to within a thousandth.

    ``by="scale"``: W ← W·min(1, c/σ), or W ← W·c/σ to hold it at the cap (``retract``). σ is found by Rayleigh and Ritz
    on the followed vectors and their next ``depth`` products. The whole weight is scaled, so its singular vectors and
    the ratios of its singular values stay. On a CPU a weight well below its cap takes one power step instead; a block
    of it that is apart from all the rest, and jumps above the cap in one step, may then be seen up to three steps late.

    ``by="clip"``: W ← W − Σ(σᵢ − c)₊uᵢvᵢᵀ over all singular values, which leaves those below c as they are. Many are
    equal to c then, and no few products tell which of these the next step raises most; so they come from the
    eigenvectors of the smaller of WᵀW and WWᵀ, at the cost of that (docs/use.md).

    Args:
        model: Its weights are capped (`spectreg.named_weights` says which); or a list of weights and of products
            (`spectreg.named_products`), whose factors are scaled.
        cap: c: a number, ``"shape"`` for √(d_out/d_in) of each weight, or a mapping from name patterns to these; a
            weight that no pattern matches is left alone.
        factor: Multiplies the cap.
        by: ``"scale"`` or ``"clip"``.
        retract: Whether to scale up as well, so that σ is c after every step.
        map: As of `spectreg.SpectralNormRegularizer`.
        input_size: As there.
        select: As there.
        embeddings: As there.
        tracked: How many vectors follow the largest singular values of each weight; two at least.
        depth: To scale: how many products with WᵀW these are joined by at each step.
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
        model: nn.Module | Sequence[Weight],
        cap: Cap | Mapping[str, Cap],
        *,
        factor: float | int = 1.0,
        by: str = "scale",
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
        if cap is None:
            raise ValueError("cap is None: it must be a number above 0, 'shape', or a mapping from name patterns.")
        check_seed(seed)
        check_number("factor", factor, lambda x: isfinite(x) and x > 0, "a finite number above 0")
        check_number("tracked", tracked, lambda x: x >= 1 and x % 1 == 0, "a whole number from 1")
        check_number("depth", depth, lambda x: x >= 1 and x % 1 == 0, "a whole number from 1")
        check_number("warmup", warmup, lambda x: x >= 0 and x % 1 == 0, "a whole number from 0")
        if by not in ("scale", "clip"):
            raise ValueError(f"by is {by!r}: it must be 'scale' or 'clip'.")
        if by == "clip" and (retract or depth != 2):
            raise ValueError("retract and depth are for by='scale': leave them out.")
        patterns = Patterns("cap", cap)
        weights = weights_of(model, select=select, map=map, input_size=input_size, embeddings=embeddings)
        caps = {w.name: patterns.get(w.name) for w in weights}
        patterns.check_all_used(list(caps))
        self.weights: list[Weight] = [w for w in weights if caps[w.name] is not None]
        self.caps = {w.name: factor * _number(w, caps[w.name]) for w in self.weights}
        self.cap, self.by, self.retract, self.depth = cap, by, retract, int(depth)
        m = max(2, int(tracked))
        self._state = State(
            self.weights, k=m, tracked=m, seed=int(seed), halves=2, every=1, warmup=int(warmup), keeps_start=False
        )
        self._rests = Rests()
        _refuse_half(self.weights)
        _refuse_shared(self.weights)

    @torch.no_grad()
    def apply(self) -> None:
        """Cap every weight that is trained, now: by hand, after each ``optimizer.step()``.

        Raises:
            ValueError: A weight is under a parametrization, or in half precision.
            RuntimeError: A sharded weight is gathered.
        """
        self._apply()

    def attach(self, *optimizers: Any) -> "SpectralNormCap":
        """Act after every ``optimizer.step()``, whoever calls it, until ``detach``.

        Of a wrapper after the step inside, and after its own where it may move the weights, as Lookahead does.

        Raises:
            TypeError: One of these is no optimizer.
            RuntimeError: It is attached already.
            ValueError: A weight is in none of the optimizers, the step of one runs no hooks, or one keeps averages of
                its own that would not be capped, or is a wrapper that keeps weights and runs no hooks.
        """
        self._attach(lambda: after_steps(optimizers, self.weights, self._apply))
        return self

    def __repr__(self) -> str:
        how = "retract" if self.retract else f"by={self.by!r}"
        return (
            f"SpectralNormCap({len(self.weights)} weights, cap={self.cap}, {how}"
            f"{', attached' if self._attachment else ''})"
        )

    @torch.no_grad()
    def _apply(self, optimizer: int | None = None, held: Container[int] | None = None) -> None:
        refuse_computed(self.weights)
        groups = self._state.trained(optimizer)
        own = {w.name for group, _ in groups for w in group.members}
        refuse_gathered([name for name in self._state.gathered if name in own])
        _refuse_half(self.weights)
        _refuse_shared([w for w in self.weights if w.tensor.requires_grad])
        for group, weights in groups:
            if held is not None:
                refuse_strangers(group.members, weights, held)
            for w, W in zip(group.members, weights, strict=True):
                refuse_uncut(w, W) if self.by == "clip" else refuse_unscalable(w, W, self.retract)
            near = self._near(group, weights)
            if near:
                with group.vectors.only(near) as vectors:
                    act = self._clip if self.by == "clip" else self._scale
                    act(vectors, [group.members[i] for i in near], [weights[i] for i in near])
            group.calls += 1

    def _near(self, group: Group, weights: list[Value]) -> list[int]:
        """Which weights may be above their caps: on a CPU all but those that a power step finds far below.

        A weight is far below if σ of that step is, and did not grow: a direction that is new, and large, raises it a
        little even where it is found late. An accelerator would be waited for.
        """
        everyone = list(range(len(weights)))
        if self.retract or weights[0].device.type != "cpu" or any(map(is_sharded, weights)):
            return everyone
        caps = [self.caps[w.name] for w in group.members]
        before = [s.max().item() for s in group.vectors.sigmas]
        far = [i for i in everyone if before[i] < FAR * caps[i]]
        if far:
            with group.vectors.only(far) as vectors:
                vectors.look_elsewhere(ELSEWHERE)
                vectors.advance([weights[i] for i in far], 2)
        now = [s.max().item() for s in group.vectors.sigmas]
        far = [i for i in far if now[i] < FAR * caps[i] and now[i] <= GROWN * before[i]]
        return [i for i in everyone if i not in far]

    def _clip(self, vectors: Vectors, members: list[Weight], weights: list[Value]) -> None:
        with full_precision(vectors.U):
            clip_(vectors, weights, [self.caps[w.name] for w in members])

    def _scale(self, vectors: Vectors, members: list[Weight], weights: list[Value]) -> None:
        vectors.look_elsewhere(ELSEWHERE)
        follow(vectors, weights, self.depth)
        inexact = False
        for w, W, s in zip(members, weights, vectors.sigmas, strict=True):
            top = s[:, 0].amax(0, keepdim=True) if w.map.norm == "max" else s[:, 0]
            rest = self._rests.factor(w, W, self.caps[w.name], top) if isinstance(W, Factors) else None
            by = self.caps[w.name] / top if rest is None else rest
            by = torch.where((top > 0) & top.isfinite(), by if self.retract else by.clamp_max(1.0), 1.0)
            s.mul_(by[:, None])
            scale_(w, W, by)
            inexact |= rest is not None
        if inexact:  # σ of a sum with a frozen term is not scaled as the rest is
            vectors.advance(weights, 2)


def _number(w: Weight, cap: Any) -> float:
    if cap == "shape":
        return float((w.map.outputs / w.map.inputs) ** 0.5)
    check_number(f"cap of {w.name!r}", cap, lambda x: isfinite(x) and x > 0, "a finite number above 0, or 'shape'")
    return float(cap)


def _refuse_half(weights: list[Weight]) -> None:
    for w in weights:
        for W in tensors_of(w.tensor):
            if W.dtype.itemsize < 4 and W.requires_grad:
                raise ValueError(
                    f"weight {w.name!r} is {W.dtype}, whose rounding is coarser than the cap's thousandth: keep the "
                    "weights that the optimizer steps in float32, or leave this one out with select."
                )


def _refuse_shared(weights: list[Weight]) -> None:
    """Refuse what would be scaled twice: a weight in two products, a product of a weight with itself."""
    held: dict[Hashable, str] = {}
    for w in weights:
        own: dict[Hashable, set[int]] = {}
        for f in w.factors if not isinstance(w.map, ProductMap) else w.map.scaled(w.factors):
            if f.computed:
                continue
            T = f.tensor
            key, slots = place_in_memory(T) if T.requires_grad else id(T), set(getattr(f.map, "slots", [-1]))
            other = held.get(key, w.name)
            if other != w.name or own.get(key, set()) & slots:
                raise ValueError(f"{f.name!r} would be scaled for {other!r} and for {w.name!r}: choose one of them.")
            own[key] = own.get(key, set()) | slots
        held |= dict.fromkeys(own, w.name)

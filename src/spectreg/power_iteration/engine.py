"""The vectors of all weights of a model, stepped together: what every form of the regularizer drives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectreg.power_iteration.bundle import Bundle, alike, is_sharded, layout_of
from spectreg.power_iteration.memory import Memory, check_same_weights
from spectreg.power_iteration.refusals import refuse_computed, refuse_constants, refuse_gathered, refuse_unfit
from spectreg.power_iteration.step import full_precision
from spectreg.weights.selection import Weight

Arranged = list[tuple[Bundle, list[Tensor], int]]


class Engine:
    """Keeps the vectors of ``weights``, wherever these go, and takes power steps for them.

    Weights that are alike are stepped in one `Bundle`; the bundles are made anew when a weight has moved, changed its
    precision, was sharded, frozen or thawed, or when ``lanes`` change: by name, the number of the optimizer that holds
    each weight.

    Args:
        weights: Those of the model.
        k: Singular values of each block.
        seed: Of the first vectors.
        halves: Half steps a call.
        every: Which calls are acted at.
        warmup: Power steps before the first.
        keeps_start: Whether the first σ are to be remembered.
    """

    def __init__(
        self, weights: list[Weight], *, k: int, seed: int, halves: int, every: int, warmup: int, keeps_start: bool
    ) -> None:
        self.weights, self.k = weights, k
        self.halves, self.every, self.warmup = halves, every, warmup
        self.keeps_start = keeps_start
        self.lanes: Mapping[str, int] = {}
        self.strengths: Mapping[str, float] = {w.name: 0.0 for w in weights}
        self.seed = seed
        self.memories = self._first()
        self._sharded = {w.name for w in weights if is_sharded(w.tensor)}
        self._gathered: list[str] = []
        self._bundles: list[tuple[Bundle, list[int], int]] = []
        self._layout: Any = None

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """λ of each weight by its name."""
        self.strengths = strengths
        for bundle, _, _ in self._bundles:
            bundle.set_strengths(strengths)

    def step(self, lane: int | None = None, effective: bool = False) -> Iterator[tuple[Bundle, list[Tensor]]]:
        """Step the trainable bundles of ``lane`` (all if None) whose turn it is, and hand them out.

        Computed weights are refused unless ``effective``, and so are sharded ones that are gathered.
        """
        bundles = self.trained(lane)
        if effective:
            for bundle, weights in bundles:
                refuse_constants([m.weight for m in bundle.memories], weights)
        else:
            refuse_computed(self.weights)
            refuse_gathered(self._gathered)
        for bundle, weights in bundles:
            calls = bundle.memories[0].calls
            for m in bundle.memories:
                m.calls += 1
            if calls % self.every == 0:
                from_u = calls // self.every * self.halves % 2 == 1
                with torch.no_grad():
                    bundle.triplets.advance(weights, self.halves, from_u)
                yield bundle, weights

    def trained(self, lane: int | None = None) -> list[tuple[Bundle, list[Tensor]]]:
        """The bundles of ``lane`` (all if None) whose weights are not frozen."""
        return [(b, weights) for b, weights, key in self.arrange() if weights[0].requires_grad and lane in (None, key)]

    def look(self, at: Callable[[Bundle, list[Tensor]], list[Tensor]]) -> dict[str, Tensor]:
        """What ``at`` makes of each bundle, by the name of the weight; frozen weights are left out."""
        values = {}
        for bundle, weights in self.trained():
            with full_precision(bundle.triplets.u):
                each = at(bundle, weights)
            values.update({m.weight.name: x for m, x in zip(bundle.memories, each, strict=True)})
        return {name: values[name] for name in self.memories if name in values}

    def arrange(self) -> Arranged:
        """The bundles with their weights as they are now, and their lanes."""
        weights = [m.weight.tensor for m in self.memories.values()]
        layout = [layout_of(W) for W in weights], self.lanes
        if layout != self._layout:
            refuse_unfit(self.weights, weights)
            sharded = {w.name for w, W in zip(self.weights, weights, strict=True) if is_sharded(W)}
            self._gathered, self._sharded = sorted(self._sharded - sharded), self._sharded | sharded
            with torch.inference_mode(False):  # validation loops may be the first to ask for σ
                self._regroup(weights)
                self._layout = layout
                self._warm_up(weights)
        return [(b, [weights[i] for i in members], lane) for b, members, lane in self._bundles]

    def save(self) -> dict[str, Any]:
        """Copies of the vectors by the name of the weight, and the names of those that were frozen all along."""
        frozen = [name for name, m in self.memories.items() if not (m.calls or m.warm or m.weight.tensor.requires_grad)]
        return {"vectors": {name: m.saved() for name, m in self.memories.items() if name not in frozen}} | (
            {"frozen": frozen} if frozen else {}
        )

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved; raises, and changes nothing, if it is of other weights."""
        vectors, frozen = state.get("vectors", {}), state.get("frozen", [])
        check_same_weights({name: m for name, m in self.memories.items() if name not in frozen}, vectors)
        self.memories = self._first()
        for name, saved in vectors.items():
            self.memories[name].load(saved)
        self._layout = None

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_bundles", "_layout", "memories", "lanes")
        return {name: value for name, value in self.__dict__.items() if name not in passing} | {"saved": self.save()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("saved")
        self.__dict__.update(state, _bundles=[], _layout=None, lanes={})
        self.memories = self._first()
        self.load(saved)

    def _first(self) -> dict[str, Memory]:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return {w.name: Memory.first(w, self.k, generator, self.keeps_start) for w in self.weights}

    def _regroup(self, weights: Sequence[Tensor]) -> None:
        """Bundle the weights that are alike in all that a step needs to be the same."""
        groups: dict[Any, list[int]] = {}
        for i, (key, (name, m)) in enumerate(zip(alike(weights), self.memories.items(), strict=True)):
            groups.setdefault((self.lanes.get(name, 0), *key, m.sigma.shape[1], m.calls, m.warm), []).append(i)
        memories = list(self.memories.values())
        self._bundles = [
            (Bundle([memories[i] for i in members], [weights[i] for i in members], self.strengths), members, key[0])
            for key, members in groups.items()
        ]

    @torch.no_grad()
    def _warm_up(self, weights: Sequence[Tensor]) -> None:
        """Bring vectors that were never stepped near the top singular pair; at least half a step, for a first σ.

        Those of frozen weights wait for the thaw.
        """
        for bundle, members, _ in self._bundles:
            mine = [weights[i] for i in members]
            if mine[0].requires_grad and not any(m.calls or m.warm for m in bundle.memories):
                bundle.triplets.advance(mine, 1)  # by itself: a whole step wants to know about how large σ is
                bundle.triplets.advance(mine, max(2 * self.warmup - 1, 0), from_u=True)
                for m in bundle.memories:
                    m.warm = True
                    m.start = m.sigma.clone() if self.keeps_start else None

"""What a regularizer remembers: the vectors of all weights, stepped together, and on their way to a file and back."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectreg.maps.factors import Value
from spectreg.power_iteration.layout import alike, is_partly_gathered, is_sharded, layout_of, mesh_of
from spectreg.power_iteration.refusals import (
    refuse_computed,
    refuse_constants,
    refuse_gathered,
    refuse_other_weights,
    refuse_schedules_in_a_graph,
    refuse_strangers,
    refuse_twice_in_memory,
    refuse_unfit,
    some_share_memory,
)
from spectreg.power_iteration.step import Vectors, full_precision
from spectreg.power_iteration.strengths import Strength, Strengths
from spectreg.weights.selection import Weight

SMALL = 16  # rows or columns of a block whose singular values are all followed where more are than are penalized
Saved = dict[str, Any]  # of one weight: u, v and sigma, calls, start if a penalty asks for it, and whether it is warm


@dataclass
class Group:
    """Weights of one device, precision and the same optimizers (by number), whose vectors are stepped together.

    ``k`` is the number of values asked for, of which a block may have fewer; ``start`` the first σ, if a penalty asks
    for it; ``is_on`` which weights have a strength above 0; ``calls`` how often a step was asked for, and ``count`` the
    same number on the device, where whose turn it is depends on it: a CUDA graph reads that, since a number of the host
    would be the same in every replay; and so does a step that only the device knows to be skipped.
    """

    members: list[Weight]
    vectors: Vectors
    optimizers: frozenset[int]
    k: int
    calls: int
    warm: bool
    start: Float[Tensor, "blocks m"] | None
    strength: Float[Tensor, "blocks 1"]
    count: Int[Tensor, ""] | None = None
    counts_there: bool = field(default=False, init=False)
    target: Float[Tensor, "..."] | None = field(default=None, init=False)
    is_on: list[bool] = field(default_factory=list, init=False)

    def set_strengths(self, strengths: Strengths, step: int) -> None:
        """Take λ of each weight at ``step``: into a tensor, so that a compiled step does not depend on the numbers."""
        numbers = strengths.at([w.name for w in self.members], step)
        self.is_on = [number > 0 for number in numbers]
        each = [number for w, number in zip(self.members, numbers, strict=True) for _ in range(w.map.blocks)]
        self.strength.copy_(torch.tensor(each, dtype=self.strength.dtype, device="cpu")[:, None])

    def acts(self) -> list[bool]:
        """Whether each weight is acted on: not with a strength of 0, which a CUDA graph may be given another of."""
        return [True] * len(self.members) if is_capturing(self.strength.device) else self.is_on

    def acted_on(self, weights: Sequence[Value]) -> tuple[list[Weight], list[Value]]:
        """The members that are acted on, and their tensors of ``weights``."""
        on = self.acts()
        return list(compress(self.members, on)), list(compress(weights, on))

    def step(self, weights: Sequence[Value], halves: int, every: int, keep: float | Tensor = 1.0) -> float | Tensor:
        """Take ``halves`` half steps if it is the group's turn: 1, else 0; both are to multiply the penalty with.

        With a ``keep`` of 0, of which only the device knows, nothing is to happen.
        """
        if isinstance(keep, Tensor) or (self.count is not None and is_capturing(self.count.device)):
            return self._step_on_the_device(weights, halves, every, keep)
        turn, self.calls = self.now(), self.now() + 1
        if self.count is not None:
            self.count += 1
        if turn % every:
            return 0.0
        self.vectors.advance(weights, halves, from_u=turn // every * halves % 2 == 1)
        return 1.0

    def now(self) -> int:
        """How often a step was asked for: read back from the device if only that knows."""
        if self.counts_there and self.count is not None:
            return int(self.count)
        return self.calls

    def last(self) -> int:
        """The number of the last step, counted from 0; 0 before the first."""
        return max(self.now() - 1, 0)

    def _step_on_the_device(self, weights: Sequence[Value], halves: int, every: int, keep: float | Tensor) -> Tensor:
        """As ``step``, but all that depends on the turn is a value on the device: what is not to be is undone.

        For an odd number of halves one more is taken, one by one, and the first or the last of them undone.
        """
        device, odd = self.strength.device, halves % 2 == 1
        if self.count is None and not is_capturing(device):  # a graph would make it anew in every replay
            self.count = torch.full((), self.calls, device=device)
        keep = (
            keep.to(device).reshape(()) > 0
            if isinstance(keep, Tensor)
            else torch.ones((), dtype=torch.bool, device=device)
        )
        acts, from_u = keep, torch.zeros_like(keep)
        if (count := self.count) is not None:
            acts, from_u = keep & (count % every == 0), count // every * halves % 2 == 1
            count += keep
            self.counts_there = True
        turns = [acts & ~from_u, *[acts] * (halves - 1), acts & from_u] if odd else [acts]
        for i, counts in enumerate(turns):
            kept = [x.clone() for x in (self.vectors.U, self.vectors.V, self.vectors.sigma)]
            self.vectors.advance(weights, 1 if odd else halves, from_u=i % 2 == 1)
            for x, old in zip((self.vectors.U, self.vectors.V, self.vectors.sigma), kept, strict=True):
                x.copy_(torch.where(counts, x, old))
        return acts.to(self.strength.dtype)


Arranged = list[tuple[Group, list[Value]]]
Turns = list[tuple[Group, list[Value], float | Tensor]]  # the last multiplies the penalty: 1, or 0 or 1 on the device


class State:
    """Holds the vectors of ``weights``, wherever these go, and takes power steps for them.

    Weights that are alike are stepped in one `Group`; the groups are made anew when a weight has moved, changed its
    precision, was sharded, frozen or thawed, or when ``optimizers_of`` changes, which says by name which optimizers
    hold each weight. In between, and in a file, the vectors of each weight are by themselves.

    Args:
        weights: Those of the model.
        k: Singular values of each block that are penalized.
        tracked: Singular values of each block that are followed; if there are more than ``k``, all of a small block.
        seed: Of the first vectors.
        halves: Half steps a call.
        every: Which calls are acted at.
        warmup: Power steps before the first.
        keeps_start: Whether the first σ are to be remembered.
    """

    def __init__(
        self, weights: list[Weight], *, k: int, tracked: int, seed: int, halves: int, every: int, warmup: int,
        keeps_start: bool,
    ) -> None:  # fmt: skip
        self.weights, self.k, self.tracked, self.seed = weights, k, tracked, seed
        self.halves, self.every, self.warmup, self.keeps_start = halves, every, warmup, keeps_start
        self.optimizers_of: Mapping[str, frozenset[int]] = {}
        self.strengths = Strengths({w.name: 0.0 for w in weights}, every)
        self._meshes: dict[str, tuple[tuple[int, ...], frozenset[int]]] = {}
        self._note_shards({w.name: w.tensor for w in weights})
        self._saved = self._first()
        self._groups: list[Group] = []
        self._layout: Any = None

    def acted_on(self) -> list[Weight]:
        """The weights whose strength is not 0 for good."""
        return [w for w in self.weights if w.name not in self.strengths.zero]

    def calls(self) -> dict[str, int]:
        """How often a step was asked for of each trained weight."""
        return {w.name: group.now() for group, _ in self.trained() for w in group.members}

    def set_strengths(self, each: Mapping[str, Strength]) -> None:
        """λ of each weight by its name, a number or a function of how many steps the weight has taken before."""
        self.strengths = Strengths(each, self.every)
        for group in self._groups:
            group.set_strengths(self.strengths, group.last())

    def strengths_now(self) -> dict[str, float]:
        """λ × ``every`` of each weight as of its last step."""
        steps = {w.name: g.last() for g in self._groups for w in g.members}
        return {w.name: self.strengths.at([w.name], steps.get(w.name, 0))[0] for w in self.weights}

    def step(
        self, optimizer: int | None = None, effective: bool = False, held: Container[int] | None = None,
        keep: float | Tensor = 1.0,
    ) -> Turns:  # fmt: skip
        """Step the groups of one optimizer (all if None) that are trained, and hand out those whose turn it is.

        With a ``keep`` of 0 nothing changes: the optimizer is to skip this step.

        Refused are computed weights and sharded ones that are gathered, of these only those gathered in part if
        ``effective``, and weights that are not among the parameters (by id) that are ``held``; all of these only where
        their strength is not 0.
        """
        groups = self.trained(optimizer)
        if effective:
            for group, weights in groups:
                refuse_constants(*group.acted_on(weights))
        else:
            refuse_computed(self.acted_on())
        acted_on = {w.name for g, _ in groups for w in g.members} - self.strengths.zero
        refuse_gathered([x for x in (self.partly_gathered if effective else self.gathered) if x in acted_on])
        if held is not None:
            acted = {w.name: W for g, weights in groups for w, W in zip(*g.acted_on(weights), strict=True)}
            members = [w for w in self.weights if w.name in acted]  # the groups have an order of their own
            refuse_strangers(members, [acted[w.name] for w in members], held)
        with torch.no_grad():
            for g, _ in groups:
                if self.strengths.vary([w.name for w in g.members]):
                    refuse_schedules_in_a_graph(is_capturing(g.strength.device))
                    g.set_strengths(self.strengths, g.now())
            turns = [(g, weights, g.step(weights, self.halves, self.every, keep)) for g, weights in groups]
        return [turn for turn in turns if isinstance(turn[2], Tensor) or turn[2]]

    def trained(self, optimizer: int | None = None) -> Arranged:
        """The groups of one optimizer (all if None) whose weights are not frozen."""
        own = [(g, weights) for g, weights in self.arrange() if optimizer is None or optimizer in g.optimizers]
        return [(g, weights) for g, weights in own if weights[0].requires_grad]

    def by_weight(self, at: Callable[[Group, list[Value]], Sequence[Tensor]]) -> dict[str, Tensor]:
        """What ``at`` makes of each group, by the name of the weight; frozen weights are left out."""
        values: dict[str, Tensor] = {}
        for group, weights in self.trained():
            with full_precision(group.vectors.U):
                values.update(zip([w.name for w in group.members], at(group, weights), strict=True))
        return {w.name: values[w.name] for w in self.weights if w.name in values}

    def arrange(self) -> Arranged:
        """The groups, with their weights as they are now."""
        weights: dict[str, Value] = {w.name: w.tensor for w in self.weights}
        if some_share_memory(list(weights.values())):
            refuse_twice_in_memory(self.acted_on())
        layout = [layout_of(W) for W in weights.values()], self.optimizers_of
        if layout != self._layout:
            refuse_unfit(self.weights, list(weights.values()))
            self._note_shards(weights)
            with torch.inference_mode(False):  # validation loops may be the first to ask for σ
                self._saved = self._at_rest()
                self._groups = self._regrouped(weights)
                self._layout = layout
                self._warm_up(weights)
        return [(g, [weights[w.name] for w in g.members]) for g in self._groups]

    def _note_shards(self, weights: Mapping[str, Value]) -> None:
        """Tell which sharded weights are ``gathered``, and which only among some ranks.

        Those are parameters for a moment, which fully_shard drops after the backward pass. The second kind is that of
        reshard_after_forward=<int>, which makes a mesh of its own.
        """
        meshes = {name: mesh_of(W) for name, W in weights.items() if is_sharded(W)}
        known = {name: self._meshes.get(name, mesh) for name, mesh in meshes.items()}
        split = [
            name
            for name, mesh in meshes.items()
            if mesh != known[name] and mesh[1] <= known[name][1] and is_partly_gathered(weights[name])
        ]
        self.partly_gathered = split
        self.gathered = sorted([*(self._meshes.keys() - meshes.keys()), *split])
        self._meshes |= {name: mesh for name, mesh in meshes.items() if name not in split}

    def save(self) -> dict[str, Any]:
        """Copies of the vectors by the name of the weight, and the names of those that were frozen all along."""
        at_rest = self._at_rest()
        frozen = [
            w.name
            for w in self.weights
            if not (at_rest[w.name]["calls"] or at_rest[w.name]["warm"] or w.tensor.requires_grad)
        ]
        vectors = {
            name: {key: x.clone() if isinstance(x, Tensor) else x for key, x in saved.items() if key != "warm"}
            for name, saved in at_rest.items()
            if name not in frozen
        }
        return {"vectors": vectors} | ({"frozen": frozen} if frozen else {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved; raises, and changes nothing, if it is of other weights."""
        vectors, frozen = state.get("vectors", {}), state.get("frozen", [])
        first = self._first()
        refuse_other_weights({name: saved for name, saved in first.items() if name not in frozen}, vectors)
        for name, saved in vectors.items():
            loaded = {key: x.clone() if isinstance(x, Tensor) else x for key, x in saved.items()}
            first[name] = loaded | {"calls": int(saved["calls"]), "warm": bool(saved["u"].any())}
        self._saved, self._groups, self._layout = first, [], None

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_groups", "_layout", "optimizers_of")
        return {name: x for name, x in self.__dict__.items() if name not in passing} | {"_saved": self._at_rest()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, optimizers_of={}, _groups=[], _layout=None)  # the model may not be whole yet

    def _first(self) -> dict[str, Saved]:
        """Gaussian v, made orthonormal: it almost surely has a part along the top singular vector, whatever the map.

        Its state has the names and types of any later one, as a distributed checkpoint wants to know before it loads.
        """
        generator = torch.Generator("cpu").manual_seed(self.seed)
        plain: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults of the moment
        first: dict[str, Saved] = {}
        for w in self.weights:
            rank = min(w.map.outputs, w.map.inputs)
            m = rank if rank <= SMALL and self.tracked > self.k else min(self.tracked, rank)
            v = torch.linalg.qr(torch.randn(w.map.blocks, w.map.inputs, m, generator=generator, **plain)).Q
            v = v.to(torch.promote_types(w.tensor.dtype, torch.float32))
            u, sigma = v.new_zeros(w.map.blocks, w.map.outputs, m), v.new_zeros(w.map.blocks, m)
            start = {"start": torch.full_like(sigma, torch.nan)} if self.keeps_start else {}
            first[w.name] = {"u": u, "v": v, "sigma": sigma, "calls": 0, "warm": False} | start
        return first

    def _at_rest(self) -> dict[str, Saved]:
        """The vectors of each weight by itself, taken from the groups if there are any."""
        at_rest = {}
        for g in self._groups:
            starts = [None] * len(g.members) if g.start is None else g.start.split([w.map.blocks for w in g.members])
            for w, (u, v, sigma), start in zip(g.members, g.vectors.at_rest(), starts, strict=True):
                saved: Saved = {"u": u, "v": v, "sigma": sigma, "calls": g.now(), "warm": g.warm}
                at_rest[w.name] = saved | ({} if start is None else {"start": start})
        return {w.name: at_rest[w.name] for w in self.weights} if at_rest else self._saved

    def _regrouped(self, weights: Mapping[str, Value]) -> list[Group]:
        """The weights that are alike in all that a step needs to be the same, together; those of one shape in a row."""
        members: dict[Any, list[Weight]] = {}
        for w, key in zip(self.weights, alike(list(weights.values())), strict=True):
            saved = self._saved[w.name]
            kept = (saved["sigma"].shape[1], saved["calls"], saved["warm"], "start" in saved)
            members.setdefault((self.optimizers_of.get(w.name, frozenset({0})), *key, *kept), []).append(w)
        for group in members.values():
            group.sort(key=lambda w: (w.map.outputs, w.map.inputs))
        return [self._group(key[0], group, [weights[w.name] for w in group]) for key, group in members.items()]

    def _group(self, optimizers: frozenset[int], members: list[Weight], weights: list[Value]) -> Group:
        device, dtype = weights[0].device, torch.promote_types(weights[0].dtype, torch.float32)
        saved = [self._saved[w.name] for w in members]
        u, v, sigma = ([s[key].to(device, dtype) for s in saved] for key in ("u", "v", "sigma"))
        start = torch.cat([s["start"].to(device, dtype) for s in saved]) if "start" in saved[0] else None
        maps = [w.map for w in members]
        if is_sharded(weights[0]):
            from spectreg.power_iteration.sharded import ShardedVectors

            vectors: Vectors = ShardedVectors(maps, u, v, sigma, self.k, weights)
        else:
            vectors = Vectors(maps, u, v, sigma, self.k)
        calls, strength = saved[0]["calls"], torch.empty_like(vectors.sigma[:, :1])
        count = torch.full((), calls, device=device) if self.every > 1 or self.halves % 2 else None
        group = Group(members, vectors, optimizers, self.k, calls, saved[0]["warm"], start, strength, count)
        group.set_strengths(self.strengths, group.last())
        return group

    @torch.no_grad()
    def _warm_up(self, weights: Mapping[str, Value]) -> None:
        """Bring vectors that were never stepped near the top singular pair; at least half a step, for a first σ.

        Those of frozen weights wait for the thaw.
        """
        for g in self._groups:
            tensors = [weights[w.name] for w in g.members]
            if tensors[0].requires_grad and not (g.calls or g.warm):
                g.vectors.advance(tensors, max(2 * self.warmup, 1))
                g.warm, g.start = True, g.vectors.sigma.clone() if self.keeps_start else None


def is_capturing(device: torch.device) -> bool:
    """Whether what is called now is recorded in a CUDA graph."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()

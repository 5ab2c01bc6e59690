"""The weights of one device, one precision and one optimizer, whose vectors are iterated together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Parameter

from spectreg.maps.base import LinearMap
from spectreg.penalties import Penalty
from spectreg.power_iteration.memory import Memory
from spectreg.power_iteration.refusals import torch_func_refused
from spectreg.power_iteration.step import Triplets, full_precision


class Bundle:
    """Takes power steps on its weights, and turns a penalty into gradients for all of them.

    ``strength`` is λ of each value: a tensor, so that a compiled step does not depend on the numbers in it.
    """

    def __init__(self, memories: Sequence[Memory], weights: Sequence[Tensor], strengths: Mapping[str, float]) -> None:
        self.memories = list(memories)
        self.device = weights[0].device
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        for m in memories:
            m.u, m.v, m.sigma = (x.to(self.device, dtype) for x in (m.u, m.v, m.sigma))
            m.start = None if m.start is None else m.start.to(self.device, dtype)
        us, vs, sigmas = ([getattr(m, x) for m in memories] for x in ("u", "v", "sigma"))
        self.triplets = _triplets([m.weight.map for m in memories], us, vs, sigmas, weights)
        for m, u, v, s in zip(memories, self.triplets.us, self.triplets.vs, self.triplets.sigmas, strict=True):
            m.u, m.v, m.sigma = u.view(m.u.shape), v.view(m.v.shape), s.view(m.sigma.shape)
        maps = [m.weight.map for m in memories]
        self._diagonal = [i for i, m in enumerate(maps) if m.norm == "max" and m.blocks > 1]
        self._target: Tensor | None = None
        self.strength = torch.empty_like(self.triplets.sigma)
        self.set_strengths(strengths)

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Take λ of each weight by its name."""
        each = [strengths[m.weight.name] for m in self.memories for _ in range(m.sigma.numel())]
        self.strength.copy_(torch.tensor(each, dtype=self.strength.dtype, device="cpu"))

    def target(self, penalty: Penalty) -> Float[Tensor, "*values"]:
        """What the penalty aims at: a number for all values, or one for each."""
        if self._target is None:
            sigma = self.triplets.sigma
            if penalty.target == "start":
                self._target = penalty.factor * torch.cat([_start(m).flatten() for m in self.memories])
            elif penalty.target == "shape":
                each = [torch.full_like(m.sigma, _aspect(m.weight.map)).flatten() for m in self.memories]
                self._target = penalty.factor * torch.cat(each)
            else:
                self._target = sigma.new_full((), penalty.factor * float(penalty.target))
        return self._target

    def counted(self) -> Bool[Tensor, " values"]:
        """Which values enter the penalty: of several diagonal blocks only the largest."""
        counted = torch.ones_like(self.triplets.sigma, dtype=torch.bool)
        for i in self._diagonal:
            part, chosen = self.triplets.sigmas[i], counted.split([len(x) for x in self.triplets.sigmas])[i]
            chosen.zero_().scatter_(0, part.topk(min(self.memories[i].counted, len(part))).indices, True)
        return counted

    def slopes(self, penalty: Penalty) -> Float[Tensor, " values"]:
        """φ'(σ) of each value that counts and is finite; 0 for the others.

        It is 0 where σ is, too: a slope that is infinite there, such as that of √σ, would make the gradient of a zero
        weight NaN.
        """
        sigma = self.triplets.sigma.nan_to_num(0.0, 0.0)
        if self._diagonal:
            sigma *= self.counted()
        return penalty.slope(sigma, self.target(penalty)).masked_fill(sigma == 0, 0.0)

    def add_gradient(self, penalty: Penalty, weights: Sequence[Tensor], factor: float | Tensor = 1.0) -> None:
        """Add λφ'(σ)·uvᵀ, times ``factor``, to the gradient of each of ``weights``."""
        targets = [_gradient_of(W, m.weight.name) for W, m in zip(weights, self.memories, strict=True)]
        self._add(targets, penalty, [1.0] * len(targets), factor)

    def move(
        self, penalty: Penalty, weights: Sequence[Tensor], rates: Sequence[float | Tensor], factor: float | Tensor
    ) -> None:
        """W ← W − ηλφ'(σ)·uvᵀ, times ``factor``, for each of ``weights`` with its learning rate η."""
        self._add(weights, penalty, [-rate for rate in rates], factor)

    def _add(
        self, targets: Sequence[Tensor], penalty: Penalty, rates: Sequence[float | Tensor], factor: float | Tensor
    ) -> None:
        self.triplets.add_outer_(targets, self.slopes(penalty) * (self.strength * factor), rates)

    def value(self, penalty: Penalty, weights: Sequence[Tensor]) -> Tensor:
        """λΣφ(σ) with a gradient for each of ``weights``."""
        t = self.triplets
        pairs = enumerate(zip(weights, t.us, t.vs, t.sigmas, strict=True))
        with torch_func_refused():
            sigma = torch.cat([PairValue.apply(W, t, i, u.clone(), v.clone(), s.clone()) for i, (W, u, v, s) in pairs])
        counted, sigma = self.counted() & t.sigma.isfinite(), torch.where(sigma > 0, sigma, sigma.detach())
        # σ that do not count are put out of the way first: 0 × NaN in the backward pass would bring them back.
        values = self.strength * penalty.value(torch.where(counted, sigma, 1.0), self.target(penalty))
        return torch.where(counted, values, 0.0).sum()


class PairValue(torch.autograd.Function):
    """σ = uᵀWv as a function of W, for unit u and v and a σ that are known: its gradient is uvᵀ."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, triplets: Triplets, i: int, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        ctx.save_for_backward(W, u, v)
        ctx.triplets, ctx.i = triplets, i
        return sigma

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True; left to itself, the penalty would just be missing
            raise NotImplementedError(
                "penalty() has no second derivative: keep it out of what is differentiated with create_graph=True."
            )
        (W, u, v), m, k = ctx.saved_tensors, ctx.triplets.maps[ctx.i], ctx.triplets.k
        scaled = u.view(m.blocks, -1, k) * gradient.view(m.blocks, 1, k)
        G = torch.zeros_like(W)
        with full_precision(u):
            ctx.triplets.add_one_(ctx.i, G, scaled.flatten(), v)
        return G, None, None, None, None, None


def _triplets(
    maps: list[LinearMap], u: list[Tensor], v: list[Tensor], sigma: list[Tensor], weights: Sequence[Tensor]
) -> Triplets:
    if is_sharded(weights[0]):
        from spectreg.power_iteration.sharded import ShardedTriplets

        return ShardedTriplets(maps, u, v, sigma, weights)
    return Triplets(maps, u, v, sigma)


def _gradient_of(W: Tensor, name: str) -> Tensor:
    G = W.grad
    if G is None:
        with torch.inference_mode(False):
            wanted = None if torch.compiler.is_compiling() else getattr(W, "grad_dtype", None)
            G = W.grad = torch.zeros_like(W, dtype=wanted)
    if G.is_sparse:
        raise ValueError(f"weight {name!r} has a sparse gradient: use sparse=False, or leave it out with select.")
    if not G.is_contiguous() and 0 in G.stride():  # expanded: several entries in one place
        G = W.grad = G.contiguous()
    if is_sharded(W) and G.placements != W.placements:  # type: ignore[attr-defined]
        G = W.grad = G.redistribute(placements=W.placements)  # type: ignore[attr-defined]
    return G


def is_sharded(W: Tensor) -> bool:
    """Whether ``W`` is a DTensor; asked by name, since importing DTensor is slow."""
    return type(W) is not Parameter and type(W).__name__ == "DTensor"


def layout_of(W: Any) -> tuple[Any, ...]:
    """How ``W`` is stored; where that changes, bundles have to be made anew."""
    mesh, placements = (W.device_mesh, W.placements) if is_sharded(W) else (None, None)
    return W.device, W.dtype, W.requires_grad, mesh, placements, W.shape, type(W)


def alike(weights: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Of each weight what those in a bundle share: device, precision, whether it is trained, and on which ranks."""
    ranks: list[Any] = [None] * len(weights)
    if any(is_sharded(W) for W in weights):
        from spectreg.power_iteration.sharded import meeting_ranks

        sharded = [W for W in weights if is_sharded(W)]
        ranks = [meeting_ranks(W, sharded) if is_sharded(W) else None for W in weights]
    return [(*layout_of(W)[:3], where) for W, where in zip(weights, ranks, strict=True)]


def _start(m: Memory) -> Tensor:
    if m.start is None:
        m.start = m.sigma.clone()
    return m.start


def _aspect(m: LinearMap) -> float:
    return (m.outputs / m.inputs) ** 0.5

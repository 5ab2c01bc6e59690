"""The weights of one device, one precision and one optimizer, whose vectors are iterated together."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.linear_maps import LinearMap
from spectreg.memory import Memory
from spectreg.penalties import Penalty
from spectreg.power import Triplets, full_precision


class Bundle:
    """Takes power steps on its weights, and turns a penalty into gradients for all of them."""

    def __init__(self, memories: Sequence[Memory], weights: Sequence[Tensor]) -> None:
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
        self._strength: tuple[int, Any] = (-1, None)
        self._target: Tensor | None = None

    def strength(self, strengths: dict[str, float], version: int) -> float | Tensor:
        """λ of each value: one number if all are alike."""
        if self._strength[0] != version:
            numbers = [strengths[m.weight.name] for m in self.memories]
            each = [torch.full_like(m.sigma, x).flatten() for m, x in zip(self.memories, numbers, strict=True)]
            self._strength = (version, numbers[0] if len(set(numbers)) == 1 else torch.cat(each))
        return self._strength[1]

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

    def counted(self) -> Float[Tensor, " values"]:
        """1 for the values that enter the penalty: if finite, and of several diagonal blocks only the largest."""
        sigma = self.triplets.sigma
        counted = sigma.isfinite().to(sigma.dtype)
        for m, part, chosen in zip(self.memories, self.triplets.sigmas, counted.split(self.sizes), strict=True):
            if m.weight.map.norm == "max" and m.weight.map.blocks > 1:
                largest = torch.zeros_like(part).scatter_(0, part.topk(min(m.counted, len(part))).indices, 1.0)
                chosen.mul_(largest)
        return counted

    @property
    def sizes(self) -> list[int]:
        """Number of values of each weight."""
        return [m.sigma.numel() for m in self.memories]

    def slopes(self, penalty: Penalty) -> Float[Tensor, " values"]:
        """φ'(σ) of each value that counts, 0 for the others."""
        sigma = self.triplets.sigma
        slopes = penalty.slope(sigma, self.target(penalty))
        # Where σ is 0, u is too: of a slope that is infinite there, such as that of √σ, nothing may remain.
        return torch.where((self.counted() > 0) & (sigma > 0), slopes, torch.zeros_like(slopes))

    def add_gradient(self, penalty: Penalty, weights: Sequence[Tensor], strength: float | Tensor) -> None:
        """Add λφ'(σ)·uvᵀ to the gradient of each of ``weights``."""
        targets = [_gradient_of(W, m.weight.name) for W, m in zip(weights, self.memories, strict=True)]
        self.triplets.add_outer_(targets, self.slopes(penalty) * strength, [1.0] * len(targets))

    def move(
        self, penalty: Penalty, weights: Sequence[Tensor], strength: float | Tensor, rates: Sequence[float | Tensor]
    ) -> None:
        """W ← W − ηλφ'(σ)·uvᵀ for each of ``weights`` with its learning rate η."""
        self.triplets.add_outer_(weights, self.slopes(penalty) * strength, [-rate for rate in rates])

    def value(self, penalty: Penalty, weights: Sequence[Tensor], strength: float | Tensor) -> Tensor:
        """λΣφ(σ) with a gradient for each of ``weights``."""
        parts = [
            PairValue.apply(W, m.weight.map, u.clone(), v.clone(), s.clone(), self.triplets.k)
            for m, W, u, v, s in zip(
                self.memories, weights, self.triplets.us, self.triplets.vs, self.triplets.sigmas, strict=True
            )
        ]
        sigma, counted = torch.cat(parts), self.counted() > 0
        sigma = torch.where(sigma > 0, sigma, sigma.detach())
        # σ that do not count are put out of the way first: 0 × NaN in the backward pass would bring them back.
        values = strength * penalty.value(torch.where(counted, sigma, torch.ones_like(sigma)), self.target(penalty))
        return torch.where(counted, values, torch.zeros_like(values)).sum()


class PairValue(torch.autograd.Function):
    """σ = uᵀWv as a function of W, for unit u and v and a σ that are known: its gradient is uvᵀ."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, m: LinearMap, u: Tensor, v: Tensor, sigma: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(W, u, v)
        ctx.map, ctx.k = m, k
        return sigma

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        W, u, v = ctx.saved_tensors
        scaled = u.view(ctx.map.blocks, -1, ctx.k) * gradient.view(ctx.map.blocks, 1, ctx.k)
        G = torch.zeros_like(W)
        with full_precision(u):
            ctx.map.add_outer_(G, scaled.flatten(), v, ctx.k)
        return G, None, None, None, None, None


def _triplets(
    maps: list[LinearMap], u: list[Tensor], v: list[Tensor], sigma: list[Tensor], weights: Sequence[Tensor]
) -> Triplets:
    if is_sharded(weights[0]):
        from spectreg.sharded import ShardedTriplets

        return ShardedTriplets(maps, u, v, sigma, weights)
    return Triplets(maps, u, v, sigma)


def _gradient_of(W: Tensor, name: str) -> Tensor:
    if W.grad is None:
        W.grad = torch.zeros_like(W)
    if W.grad.is_sparse:
        raise ValueError(f"weight {name!r} has a sparse gradient: use sparse=False, or leave it out with select.")
    if is_sharded(W) and W.grad.placements != W.placements:  # type: ignore[attr-defined]
        W.grad = W.grad.redistribute(placements=W.placements)  # type: ignore[attr-defined]
    return W.grad


def is_sharded(W: Tensor) -> bool:
    """Whether ``W`` is a DTensor; asked by name, since importing DTensor is slow."""
    return type(W).__name__ == "DTensor"


def _start(m: Memory) -> Tensor:
    if m.start is None:
        m.start = m.sigma.clone()
    return m.start


def _aspect(m: LinearMap) -> float:
    return (m.outputs / m.inputs) ** 0.5

"""From the vectors of a group to gradients of its weights: added, taken from the weights, or as a term of the loss."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectreg.maps.base import LinearMap
from spectreg.penalties import Penalty
from spectreg.power_iteration.layout import is_sharded
from spectreg.power_iteration.refusals import torch_func_refused
from spectreg.power_iteration.state import Group
from spectreg.power_iteration.step import Vectors, full_precision


def add_gradient(group: Group, weights: Sequence[Tensor], penalty: Penalty, factor: float | Tensor = 1.0) -> None:
    """Add λφ'(σ)·uvᵀ, times ``factor``, to the gradient of each of ``weights`` whose λ is not 0."""
    if any(acts := group.acts()):
        its = zip(weights, group.members, acts, strict=True)
        gradients = [gradient_of(W, w.name) if on else None for W, w, on in its]
        group.vectors.add_outer_(gradients, scales(group, penalty, factor), [1.0] * len(gradients))


def move(
    group: Group, weights: Sequence[Tensor], penalty: Penalty, rates: Sequence[float | Tensor], factor: float | Tensor
) -> None:
    """W ← W − ηλφ'(σ)·uvᵀ, times ``factor``, for each of ``weights`` whose λ is not 0, with its learning rate η."""
    if any(acts := group.acts()):
        moved = [W if on else None for W, on in zip(weights, acts, strict=True)]
        group.vectors.add_outer_(moved, scales(group, penalty, factor), [-rate for rate in rates])


def value(group: Group, weights: Sequence[Tensor], penalty: Penalty) -> Float[Tensor, ""]:
    """λΣφ(σ) with a gradient for each of ``weights`` whose λ is not 0."""
    v = group.vectors
    parts = enumerate(zip(weights, group.acts(), v.us, v.vs, v.sigmas, strict=True))
    with torch_func_refused():
        each = [
            PairValue.apply(W, v, i, u[: v.k].clone(), x[: v.k].clone(), s[:, : v.k].clone())
            if acts else s[:, : v.k].clone()
            for i, (W, acts, u, x, s) in parts
        ]  # fmt: skip
    sigma = torch.cat(each)
    sigma = torch.where(sigma > 0, sigma, sigma.detach())
    enters = sigma.isfinite() if (some := counted(group)) is None else sigma.isfinite() & some
    # σ that do not count are put out of the way first: 0 × NaN in the backward pass would bring them back.
    values = group.strength * penalty.value(torch.where(enters, sigma, 1.0), target(group, penalty))
    return torch.where(enters & (group.strength > 0), values, 0.0).sum()


def scales(group: Group, penalty: Penalty, factor: float | Tensor) -> Float[Tensor, "blocks k"]:
    """λφ'(σ) times ``factor`` of each value that counts and is finite; 0 for the others.

    It is 0 where σ is, too: a slope that is infinite there, such as that of √σ, would make the gradient of a zero
    weight NaN.
    """
    sigma = group.vectors.sigma[:, : group.vectors.k].nan_to_num(0.0, 0.0)
    if (some := counted(group)) is not None:
        sigma = sigma * some
    slope = penalty.slope(sigma, target(group, penalty)) * group.strength
    slope = slope.masked_fill_(sigma == 0, 0.0)
    return slope * factor if isinstance(factor, Tensor) or factor != 1 else slope


def target(group: Group, penalty: Penalty) -> Float[Tensor, "#blocks #k"]:
    """What the penalty aims at: a number for all values, or one for each."""
    if group.target is None:
        v, k = group.vectors, group.vectors.k
        if penalty.target == "start":
            group.start = v.sigma.clone() if group.start is None else group.start
            group.target = penalty.factor * group.start[:, :k]
        elif penalty.target == "shape":
            each = [torch.full_like(s[:, :k], _aspect(m)) for s, m in zip(v.sigmas, v.maps, strict=True)]
            group.target = penalty.factor * torch.cat(each)
        else:
            group.target = v.sigma.new_full((1, 1), penalty.factor * float(penalty.target))
    return group.target


def counted(group: Group) -> Bool[Tensor, "blocks k"] | None:
    """Which values enter the penalty: of several diagonal blocks only the largest. None if all do."""
    v = group.vectors
    several = [i for i, m in enumerate(v.maps) if m.norm == "max" and m.blocks > 1]
    if not several:
        return None
    enters = torch.ones_like(v.sigma[:, : v.k], dtype=torch.bool)
    parts = enters.split([m.blocks for m in v.maps])
    for i in several:
        sigma = v.sigmas[i][:, : v.k].reshape(-1)
        largest = sigma.topk(min(group.k, len(sigma))).indices
        parts[i].view(-1).zero_().scatter_(0, largest, True)
    return enters


class PairValue(torch.autograd.Function):
    """σ = uᵀWv as a function of W, for unit u and v and a σ that are known: its gradient is uvᵀ."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, vectors: Vectors, i: int, u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        ctx.save_for_backward(W, u, v)
        ctx.vectors, ctx.i = vectors, i
        return sigma

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "blocks k"]) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True; left to itself, the penalty would just be missing
            raise NotImplementedError(
                "penalty() has no second derivative: keep it out of what is differentiated with create_graph=True."
            )
        W, u, v = ctx.saved_tensors
        scaled = u.unflatten(1, (len(gradient), -1)) * gradient.t()[:, :, None]
        G = torch.zeros_like(W)
        with full_precision(u):
            ctx.vectors.add_one_(ctx.i, G, scaled.flatten(1), v)
        return G, None, None, None, None, None


def gradient_of(W: Tensor, name: str) -> Tensor:
    """The gradient of ``W`` to add to: made where there is none, and laid out as ``W`` is."""
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


def _aspect(m: LinearMap) -> float:
    return (m.outputs / m.inputs) ** 0.5

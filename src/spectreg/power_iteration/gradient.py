"""From the vectors of a group to gradients of its weights: added, taken from the weights, or as a term of the loss."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spectreg.maps.base import LinearMap
from spectreg.maps.factors import Factors, Target, Update, Value, tensors_of
from spectreg.penalties import Penalty
from spectreg.power_iteration.layout import is_sharded
from spectreg.power_iteration.refusals import refuse_resharded, torch_func_refused
from spectreg.power_iteration.state import Group
from spectreg.power_iteration.step import Vectors, full_precision
from spectreg.weights.selection import Weight


def add_gradient(group: Group, weights: Sequence[Value], penalty: Penalty, factor: float | Tensor = 1.0) -> None:
    """Add λφ'(σ)·uvᵀ, times ``factor``, to the gradient of each of ``weights`` whose λ is not 0."""
    if any(acts := group.acts()):
        parts = zip(weights, group.members, acts, strict=True)
        gradients = [target_of(W, w.name) if on else None for W, w, on in parts]
        group.vectors.add_outer_(gradients, scales(group, penalty, factor), [1.0] * len(gradients))


def move(
    group: Group,
    weights: Sequence[Value],
    penalty: Penalty,
    rate: Callable[[Tensor], float | Tensor],
    factor: float | Tensor,
) -> None:
    """W ← W − ηλφ'(σ)·uvᵀ, times ``factor``, for each of ``weights`` whose λ is not 0, with its learning rate η."""
    targets: list[Target | None] = []
    rates: list[float | Tensor] = []
    for W, on in zip(weights, acts := group.acts(), strict=True):
        if on and isinstance(W, Factors):
            into = tuple(T if T.requires_grad else None for T in W)
            targets.append(Update(W, into, tuple(0.0 if T is None else rate(T) for T in into)))
            rates.append(-1.0)
        elif on and isinstance(W, Tensor):
            targets.append(W)
            rates.append(-rate(W))
        else:
            targets.append(None)
            rates.append(0.0)
    if any(acts):
        group.vectors.add_outer_(targets, scales(group, penalty, factor), rates)


def value(group: Group, weights: Sequence[Value], penalty: Penalty) -> Float[Tensor, ""]:
    """λΣφ(σ) with a gradient for each of ``weights`` whose λ is not 0."""
    v = group.vectors
    parts = enumerate(zip(group.members, weights, group.acts(), v.us, v.vs, v.sigmas, strict=True))
    with torch_func_refused():
        each = [
            PairValue.apply(v, i, w, u[: v.k].clone(), x[: v.k].clone(), s[:, : v.k].clone(), *tensors_of(W))
            if acts else s[:, : v.k].clone()
            for i, (w, W, acts, u, x, s) in parts
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
            if several := apart(group):
                return penalty.factor * by_rank(group, group.start[:, :k], several)
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
    several = apart(group)
    if not several:
        return None
    enters = torch.ones_like(v.sigma[:, : v.k], dtype=torch.bool)
    parts = enters.split([m.blocks for m in v.maps])
    for i in several:
        sigma = v.sigmas[i][:, : v.k].reshape(-1)
        largest = by_size(sigma)[: group.k]
        parts[i].view(-1).zero_().scatter_(0, largest, True)
    return enters


def apart(group: Group) -> list[int]:
    """Which weights are one map of several diagonal blocks."""
    return [i for i, m in enumerate(group.vectors.maps) if m.norm == "max" and m.blocks > 1]


def by_rank(group: Group, start: Float[Tensor, "blocks k"], several: Sequence[int]) -> Float[Tensor, "blocks k"]:
    """``start``, the values of ``several`` weights in the order of σ now: another block may be the largest."""
    start = start.clone()
    parts = start.split([m.blocks for m in group.vectors.maps])
    for i in several:
        now = group.vectors.sigmas[i][:, : group.vectors.k].flatten()
        parts[i].view(-1)[by_size(now)] = parts[i].flatten().sort(descending=True).values
    return start


def by_size(sigma: Float[Tensor, " values"]) -> Int[Tensor, " values"]:
    """Where the values are, the largest first."""
    return sigma.argsort(descending=True, stable=True)


class PairValue(torch.autograd.Function):
    """σ = uᵀWv as a function of W, for unit u and v and a σ that are known: its gradient is uvᵀ.

    Of a product it is a function of each factor.
    """

    @staticmethod
    def forward(
        ctx: Any, vectors: Vectors, i: int, weight: Weight, u: Tensor, v: Tensor, sigma: Tensor, *W: Tensor
    ) -> Tensor:
        ctx.save_for_backward(u, v, *W)
        ctx.vectors, ctx.i, ctx.weight = vectors, i, weight
        return sigma

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "blocks k"]) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True; left to itself, the penalty would just be missing
            raise NotImplementedError(
                "penalty() has no second derivative: keep it out of what is differentiated with create_graph=True."
            )
        u, v, *W = ctx.saved_tensors
        refuse_resharded(ctx.weight, W)
        scaled = u.unflatten(1, (len(gradient), -1)) * gradient.t()[:, :, None]
        G = [torch.zeros_like(T) if wanted else None for T, wanted in zip(W, ctx.needs_input_grad[6:], strict=True)]
        target = G[0] if len(W) == 1 else Update(Factors(W), tuple(G), (1.0,) * len(W))
        with full_precision(u):
            ctx.vectors.add_one_(ctx.i, target, scaled.flatten(1), v)
        return None, None, None, None, None, None, *G


def target_of(W: Value, name: str) -> Target:
    """Where the gradient of ``W`` is added to: of a product, those of the factors that are trained."""
    if isinstance(W, Factors):
        into = tuple(gradient_of(T, name) if T.requires_grad else None for T in W)
        return Update(W, into, (1.0,) * len(W))
    return gradient_of(W, name)


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

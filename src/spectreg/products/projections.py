"""Which heads of which projections the queries and keys of attention are."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectreg.linalg.products import in_double
from spectreg.maps.behaviour import has_forward_of
from spectreg.products.attention import Attention, Projection, attention_of
from spectreg.weights.module_names import named_modules
from spectreg.weights.reading import read_weight

OWN_FORWARD = (
    "has a forward of its own, or is wrapped by an adapter: give an example on which it calls "
    "scaled_dot_product_attention, or take the adapter's weights over with merge_and_unload."
)
Head = Float[Tensor, "width _"]  # rows of a projection in float64; the last column is the bias


@dataclass(frozen=True)
class Matched:
    """The head of a projection that a head of queries or keys is ``factor`` times, but for a rotation.

    ``alone``: no other head has the same weight, which would make the same of the same inputs.
    """

    projection: Projection
    slot: int
    weight: Head = field(repr=False)
    factor: float = 1.0
    rotated: bool = False
    alone: bool = True


@dataclass(frozen=True)
class Attended:
    """One attention: its queries, the key of each, which several may share, and what multiplies their products."""

    name: str
    queries: list[Matched]
    keys: list[Matched]
    scale: list[float]
    rotated: bool


def attended(model: nn.Module, example: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Attended]:
    """Each attention of ``model`` by the name of its module; those after the first of one have a number behind it.

    To be called where the model may run: in evaluation mode, without gradients.

    Raises:
        ValueError: No attention, or one whose queries or keys no projection of the model makes.
    """
    known, unknown = attended_in_torch(model)
    if example or keywords:
        with attention_of(model) as calls:
            model(*example, **keywords)
        known |= {one.name: one for one in attended_in(calls)}
    for name in unknown.keys() - known.keys():
        raise ValueError(f"{name!r} ({type(unknown[name]).__name__}) {OWN_FORWARD}")
    if not known:
        what = "called no scaled_dot_product_attention" if example or keywords else "has no nn.MultiheadAttention"
        raise ValueError(f"{type(model).__name__} {what}: give an example of its arguments, on which it calls it.")
    return known


def attended_in_torch(model: nn.Module) -> tuple[dict[str, Attended], dict[str, nn.Module]]:
    """Every ``nn.MultiheadAttention``, and the ones whose class or wrapper does something else."""
    adapted = {id(getattr(module, "base_layer", None)) for module in model.modules()}
    known: dict[str, Attended] = {}
    unknown: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        if isinstance(module, nn.MultiheadAttention):
            if has_forward_of(module, (nn.MultiheadAttention,)) and id(module) not in adapted:
                known[name] = of_torch(name, module)
            else:
                unknown[name] = module
    return known, unknown


def of_torch(name: str, module: nn.MultiheadAttention) -> Attended:
    if module.bias_k is not None:
        raise ValueError(f"{name!r} has bias_k, a key that no weight makes: build it with add_bias_kv=False.")
    n, fused = module.num_heads, module._qkv_same_embed_dim
    width = module.embed_dim // n  # as the forward pass has it; head_dim is of the time when it was built
    bias = None if module.in_proj_bias is None else module.in_proj_bias.detach()
    sides = []
    for part, attribute in enumerate(("q_proj_weight", "k_proj_weight")):
        attribute = "in_proj_weight" if fused else attribute
        W = read_weight(module, attribute).detach()
        own_bias = bias if bias is None or fused else bias.chunk(3)[part]
        projection = Projection(name, module, attribute, False, W, own_bias, W.new_zeros(0, W.shape[1]), 0.0)
        first = part * n if fused else 0
        weights = projection.heads(width)[1]
        sides.append([Matched(projection, slot, weights[slot]) for slot in range(first, first + n)])
    return Attended(name, sides[0], sides[1], [width**-0.5] * n, rotated=False)


def attended_in(calls: list[Attention]) -> Iterator[Attended]:
    """Each attention of ``calls``, once."""
    seen: dict[str, list[tuple[Any, ...]]] = {}
    for call in calls:
        queries, keys = made_by(call, "queries", call.query), made_by(call, "keys", call.key)
        if len(queries) % len(keys):
            raise ValueError(f"attention in {call.name!r} has {len(queries)} heads of queries, {len(keys)} of keys.")
        keys = [key for key in keys for _ in range(len(queries) // len(keys))]
        scale = [abs(call.scale * q.factor * k.factor) for q, k in zip(queries, keys, strict=True)]
        rotated = any(head.rotated for head in (*queries, *keys))
        slots = ((head.projection.name, head.slot) for head in (*queries, *keys))
        who = (rotated, *(f"{factor:.3g}" for factor in scale), *slots)
        known = seen.setdefault(call.name, [])
        if who in known:
            continue
        known.append(who)
        name = call.name if len(known) == 1 else f"{call.name}[{len(known)}]"
        yield Attended(name, queries, keys, scale, rotated)


def made_by(call: Attention, what: str, x: Tensor) -> list[Matched]:
    """The heads of projections that those of ``x`` (batch × heads × positions × width, or without heads) are."""
    x = x[:, None] if x.ndim == 3 else x  # one head
    if x.ndim == 4:
        given = in_double(x.transpose(0, 1).flatten(1, 2))
        for projection in reversed(call.before):
            if len(projection.inputs) == given.shape[1] and len(projection.weight) % x.shape[-1] == 0:
                eps = max(projection.eps, torch.finfo(x.dtype).eps)
                matched = matches(given, projection, tolerance=max(2 * eps, 1e-5))
                if matched:
                    alone = not any(repeats(other, projection) for other in call.before)
                    return [replace(head, alone=head.alone and alone) for head in matched]
    raise ValueError(
        f"the {what} of the attention in {call.name!r} are no outputs of a linear layer, not even up to a rotation and "
        "a constant: something else is between (a normalization of queries or keys, an adapter: merge it), or the "
        "example cannot tell (give several sequences of a few different tokens)."
    )


def repeats(other: Projection, one: Projection) -> bool:
    """Whether another layer has the very weights and inputs of ``one``."""
    if other.module is one.module or other.weight.data_ptr() == one.weight.data_ptr():
        return False
    alike = other.weight.shape == one.weight.shape and other.inputs.shape == one.inputs.shape
    return alike and torch.equal(other.inputs, one.inputs) and torch.equal(other.weight, one.weight)


def matches(given: Float[Tensor, "heads n width"], projection: Projection, tolerance: float) -> list[Matched] | None:
    """For each head given the one of ``projection`` that it is; None unless every one is, and no doubt is left."""
    made, weights = projection.heads(given.shape[2])
    varies = made.norm(dim=2).std(1, correction=0) > 4 * tolerance * made.norm(dim=2).mean(1)
    trusted = varies | (weights == 0).flatten(1).all(1)  # lengths that do not vary look like normalized ones
    for rotated in (False, True):
        x, y = (t.norm(dim=2) if rotated else t.flatten(1) for t in (given, made))
        factor = (x @ y.T) / y.square().sum(1).clamp_min(torch.finfo(y.dtype).tiny)
        off = (x[:, None] - factor[..., None] * y).norm(dim=2)
        same = (off <= tolerance * x.norm(dim=1)[:, None]) & trusted
        if not bool(same.any(1).all()) or (rotated and given.shape[1] < 4):
            continue
        choices = [row.nonzero()[:, 0].tolist() for row in same]
        if any(not torch.equal(weights[c[0]], weights[j]) for c in choices for j in c):
            return None
        factor = torch.where((factor - 1).abs() <= tolerance, 1.0, factor)
        return [
            Matched(projection, c[0], weights[c[0]], float(factor[h, c[0]]), rotated, len(c) == 1)
            for h, c in enumerate(choices)
        ]
    return None

"""Measure: how large the logits of attention can become, from the weights of queries and keys."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectreg.linalg.products import in_double, norm_of, norm_of_product
from spectreg.maps.behaviour import has_forward_of
from spectreg.measures._attended import Attention, Projection, attention_of
from spectreg.measures._model import as_found, refuse_sharded
from spectreg.weights.module_names import named_modules

OWN_FORWARD = (
    "has a forward of its own, or is wrapped by an adapter: give an example on which it calls "
    "scaled_dot_product_attention, or take the adapter's weights over with merge_and_unload."
)
Head = Float[Tensor, "width _"]  # rows of a projection; the last column is the bias


@dataclass(frozen=True)
class LogitBound:
    """Of one attention: a bound on |scale·qᵀk| over all inputs of given lengths, a number each head.

    ``sigma`` is ‖W_QᵀW_K‖₂, with the keys that the head shares with others. ``rotated``: something between projections
    and logits turns queries and keys by position and keeps their lengths (rotary embeddings). Then ``sigma`` bounds
    nothing but a query and key turned alike, and the bound is ‖W_Q‖₂‖W_K‖₂ instead.
    """

    sigma: Float[Tensor, " heads"]
    scale: Float[Tensor, " heads"]
    rotated: bool
    terms: Float[Tensor, "heads 4"] = field(repr=False)  # of both inputs, the query's, the key's, and neither

    @property
    def value(self) -> Float[Tensor, " heads"]:
        """Without biases: the largest logit of inputs of length 1, logits per squared unit of the input."""
        return self.scale * self.terms[:, 0]

    def at(self, query: float | int, key: float | int | None = None) -> Float[Tensor, " heads"]:
        """The largest |logit| for inputs of these lengths ‖x‖₂, biases counted; masks and position biases are not."""
        key = query if key is None else key
        return self.scale * (self.terms @ self.terms.new_tensor([query * key, query, key, 1.0]))


@torch.no_grad()
def logit_bound(model: nn.Module, *example: Any, **keywords: Any) -> dict[str, LogitBound]:
    """How large the logits of each attention of ``model`` can become, by the name of its module.

    ‖W_QᵀW_K‖₂ of every head, exact to rounding in float64, from the factors: no product of the size of the input is
    formed, and keys that heads share are not repeated. An ``nn.MultiheadAttention`` says where its heads are. For any
    other attention give an ``example`` of the model's arguments: what reaches ``scaled_dot_product_attention`` is
    compared with every head of every linear layer that ran before, so that fused, grouped and multi-query projections
    are told by what they do on the example. The model is left as found.

    Inputs x are those of the projections. After a layer or RMS normalization of n features with scale γ and shift β,
    ‖x‖₂ is at most √n·max|γ| + ‖β‖₂; see ``LogitBound.at``. What masks and position biases add is not counted.

    Raises:
        ValueError: No attention; queries or keys that are no projection up to a rotation and a constant (a
            normalization of them, an adapter beside the projection); a softmax outside of
            ``scaled_dot_product_attention``; an example too small to tell; sharded parameters.

    >>> model = nn.MultiheadAttention(4, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.in_proj_weight.copy_(torch.eye(4).repeat(3, 1))
    >>> logit_bound(model)[""].value  # 1/√2
    tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    refuse_sharded(model)
    with as_found(model), torch.no_grad():
        bounds, unknown = bounds_of_torch(model)
        if example or keywords:
            with attention_of(model) as calls:
                model(*example, **keywords)
            bounds |= dict(bounds_of(calls))
    for name in unknown.keys() - bounds.keys():
        raise ValueError(f"{name!r} ({type(unknown[name]).__name__}) {OWN_FORWARD}")
    if not bounds:
        what = "called no scaled_dot_product_attention" if example or keywords else "has no nn.MultiheadAttention"
        raise ValueError(f"{type(model).__name__} {what}: give an example of its arguments, on which it calls it.")
    return bounds


def bounds_of_torch(model: nn.Module) -> tuple[dict[str, LogitBound], dict[str, nn.Module]]:
    """Those of every ``nn.MultiheadAttention``, and the ones whose class or wrapper does something else."""
    adapted = {id(getattr(module, "base_layer", None)) for module in model.modules()}
    bounds: dict[str, LogitBound] = {}
    unknown: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        if isinstance(module, nn.MultiheadAttention):
            if has_forward_of(module, (nn.MultiheadAttention,)) and id(module) not in adapted:
                bounds[name] = of_torch(name, module)
            else:
                unknown[name] = module
    return bounds, unknown


def of_torch(name: str, module: nn.MultiheadAttention) -> LogitBound:
    if module.bias_k is not None:
        raise ValueError(f"{name!r} has bias_k, a key that no weight makes: build it with add_bias_kv=False.")
    if module.in_proj_weight is None:
        Q, K = module.q_proj_weight, module.k_proj_weight
    else:
        Q, K, _ = module.in_proj_weight.chunk(3)
    biases = [None, None] if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[:2]
    queries, keys = (with_bias(W, b).unflatten(0, (module.num_heads, -1)) for W, b in zip((Q, K), biases, strict=True))
    scale = torch.full((module.num_heads,), module.head_dim**-0.5, dtype=torch.float64, device="cpu")
    return bound_of(list(queries), list(keys), scale, rotated=False)


def with_bias(W: Tensor, b: Tensor | None) -> Tensor:
    W = in_double(W)
    return torch.cat([W, W.new_zeros(len(W), 1) if b is None else in_double(b)[:, None]], 1)


def bounds_of(calls: list[Attention]) -> Iterator[tuple[str, LogitBound]]:
    """The bound of each attention; those after the first of one module have a number behind its name."""
    seen: dict[str, list[tuple[Any, ...]]] = {}
    for call in calls:
        queries, keys = made_by(call, "queries", call.query), made_by(call, "keys", call.key)
        if len(queries) % len(keys):
            raise ValueError(f"attention in {call.name!r} has {len(queries)} heads of queries, {len(keys)} of keys.")
        keys = [key for key in keys for _ in range(len(queries) // len(keys))]
        scale = [abs(call.scale * q.factor * k.factor) for q, k in zip(queries, keys, strict=True)]
        rotated = any(head.rotated for head in (*queries, *keys))
        who = (rotated, *(f"{factor:.3g}" for factor in scale), *(head.slot for head in (*queries, *keys)))
        known = seen.setdefault(call.name, [])
        if who in known:
            continue
        known.append(who)
        scales = torch.tensor(scale, dtype=torch.float64, device="cpu")
        bound = bound_of([q.weight for q in queries], [k.weight for k in keys], scales, rotated)
        yield call.name if len(known) == 1 else f"{call.name}[{len(known)}]", bound


@dataclass(frozen=True)
class Matched:
    """The head of a projection that a head of queries or keys is ``factor`` times, but for a rotation."""

    slot: tuple[str, int]
    weight: Head
    factor: float
    rotated: bool


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
                    return matched
    raise ValueError(
        f"the {what} of the attention in {call.name!r} are no outputs of a linear layer, not even up to a rotation and "
        "a constant: something else is between (a normalization of queries or keys, an adapter: merge it), or the "
        "example cannot tell (give several sequences of a few different tokens)."
    )


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
            Matched((projection.name, c[0]), weights[c[0]], float(factor[h, c[0]]), rotated)
            for h, c in enumerate(choices)
        ]
    return None


def bound_of(queries: list[Head], keys: list[Head], scale: Float[Tensor, " heads"], rotated: bool) -> LogitBound:
    """From the heads; a key that several share comes several times, each time the same memory."""
    pairs = list(zip(queries, keys, strict=True))
    sigma = torch.stack([norm_of_product(q[:, :-1], k[:, :-1]) for q, k in pairs]).cpu()
    terms = torch.stack([terms_if_rotated(q, k) if rotated else biases(q, k) for q, k in pairs]).cpu()
    terms = terms if rotated else torch.cat([sigma[:, None], terms], 1)
    return LogitBound(sigma, scale, rotated, terms)


def biases(query: Head, key: Head) -> Float[Tensor, "3"]:
    """What a logit has of the query's input alone, of the key's alone, and of neither."""
    b, c = query[:, -1], key[:, -1]
    return torch.stack([(query[:, :-1].T @ c).norm(), (key[:, :-1].T @ b).norm(), (b @ c).abs()])


def terms_if_rotated(query: Head, key: Head) -> Float[Tensor, "4"]:
    """The same after what it has of both inputs, whatever orthogonal map is between."""
    Q, K, b, c = norm_of(query[:, :-1]), norm_of(key[:, :-1]), query[:, -1].norm(), key[:, -1].norm()
    return torch.stack([Q * K, Q * c, b * K, b * c])

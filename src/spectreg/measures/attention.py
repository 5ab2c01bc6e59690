"""Measure: how large the logits of attention can become, from the weights of queries and keys."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectreg.linalg.products import norm_of, norm_of_product
from spectreg.measures._model import as_found, refuse_sharded
from spectreg.measures._nested import copied
from spectreg.products.projections import Attended, Head, attended


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
        found = attended(model, copied(example), copied(keywords))
        return {name: bound_of(attention) for name, attention in found.items()}


def bound_of(attention: Attended) -> LogitBound:
    """From the heads; a key that several share comes several times, each time the same memory."""
    pairs = [(q.weight, k.weight) for q, k in zip(attention.queries, attention.keys, strict=True)]
    sigma = torch.stack([norm_of_product(q[:, :-1], k[:, :-1]) for q, k in pairs]).cpu()
    terms = torch.stack([terms_if_rotated(q, k) if attention.rotated else biases(q, k) for q, k in pairs]).cpu()
    terms = terms if attention.rotated else torch.cat([sigma[:, None], terms], 1)
    scale = torch.tensor(attention.scale, dtype=torch.float64, device="cpu")
    return LogitBound(sigma, scale, attention.rotated, terms)


def biases(query: Head, key: Head) -> Float[Tensor, "3"]:
    """What a logit has of the query's input alone, of the key's alone, and of neither."""
    b, c = query[:, -1], key[:, -1]
    return torch.stack([(query[:, :-1].T @ c).norm(), (key[:, :-1].T @ b).norm(), (b @ c).abs()])


def terms_if_rotated(query: Head, key: Head) -> Float[Tensor, "4"]:
    """The same after what it has of both inputs, whatever orthogonal map is between."""
    Q, K, b, c = norm_of(query[:, :-1]), norm_of(key[:, :-1]), query[:, -1].norm(), key[:, -1].norm()
    return torch.stack([Q * K, Q * c, b * K, b * c])

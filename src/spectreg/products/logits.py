"""W_QᵀW_K of every head of an attention, as a product."""

from collections import Counter
from typing import Any

from torch import nn

from spectreg.maps.heads import HeadsMap
from spectreg.maps.product import Factor, ProductMap
from spectreg.products.projections import Attended, Matched, attended
from spectreg.weights.product import Product
from spectreg.weights.selection import Weight


def logits(model: nn.Module, example: tuple[Any, ...], keywords: dict[str, Any]) -> list[Product]:
    """One product for each attention of ``model``, whose blocks are the heads."""
    return [product_of(attention) for attention in attended(model, example, keywords).values()]


def product_of(attention: Attended) -> Product:
    """Keys in the order in which they first come, each with its queries."""
    if not all(head.alone for head in (*attention.queries, *attention.keys)):
        raise ValueError(
            f"some heads or projections of the attention in {attention.name!r} have the same weights, so that it "
            "cannot be told which of them makes which queries and keys: build the products once they differ."
        )
    own = [key.slot for key in attention.keys]
    queries_of = Counter(own)
    keys, shared = list(queries_of), max(queries_of.values())
    if set(queries_of.values()) != {shared}:
        raise ValueError(f"the keys of the attention in {attention.name!r} have different numbers of queries.")
    order = sorted(range(len(own)), key=lambda h: keys.index(own[h]))
    K = heads_of(attention.keys[0], keys)
    Q = heads_of(attention.queries[0], [attention.queries[h].slot for h in order])
    chain = (Factor(0, K.map, shared=shared, share=0.5), Factor(1, Q.map, turned=True, share=0.5))
    m = ProductMap((chain,), Q.map.inputs, K.map.inputs, len(order), "each")
    name = f"{attention.name}.logits".lstrip(".")
    module = attention.queries[0].projection.module
    return Product(name, module, "", m, (K.shape, Q.shape), parts=(K, Q))


def heads_of(head: Matched, slots: list[int]) -> Weight:
    """The weight of the projection of ``head``, taken for its heads in ``slots``."""
    p = head.projection
    shape = tuple(p.weight.T.shape if p.columns else p.weight.shape)
    m = HeadsMap(shape, len(head.weight), tuple(slots), p.columns)
    return Weight(f"{p.name}.{p.attribute}".lstrip("."), p.module, p.attribute, m, shape)

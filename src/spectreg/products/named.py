"""The products of a model's weights that have a spectral norm of interest, each as one weight."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from spectreg.maps.behaviour import is_sharded, undisturbed
from spectreg.products.adapters import adapters
from spectreg.products.logits import logits
from spectreg.products.normalized import normalized
from spectreg.weights.product import Product
from spectreg.weights.selection import Weight, named_weights

Kind = Literal["logits", "update", "merged", "normalized"]


def named_products(model: nn.Module, kind: str, *example: Any, **keywords: Any) -> list[Product]:
    """The products of weights of ``model`` of one kind, to be penalized or capped as weights are.

    Pass them, or some of them, in place of the model: ``SpectralNormRegularizer(named_products(model, "logits", x),
    0.01)``; together with weights as ``[*named_weights(model), *named_products(…)]``. Power iteration goes through
    the factors, of which no product is formed, and the gradient goes to every factor that is trained. Names are those
    of the module and the kind.

    Args:
        kind: ``"logits"``: W_QᵀW_K of every head of each attention, without its scale; keys that heads share are not
            repeated. Where positions are rotated in between (rotary embeddings), it is the norm at equal positions,
            and ‖W_Q‖‖W_K‖ bounds the others. ``"update"``: sBA of each adapted layer (LoRA), all active adapters
            summed. ``"merged"``: W + sBA. ``"normalized"``: diag(γ/√(var + ε))·W of each layer with a batch
            normalization after it, in evaluation mode: its running variance is a constant.
        example: Arguments of the model, on which it is looked up what meets what; needed for ``"normalized"``, and for
            ``"logits"`` unless every attention is an ``nn.MultiheadAttention``. The model is left as found.

    Raises:
        ValueError: An unknown kind; no such product; a layer that does not compute the product of its factors; an
            example where none is needed; sharded parameters.

    >>> layer = nn.MultiheadAttention(4, 2)
    >>> [(p.name, p.map.blocks, p.map.outputs, p.map.inputs) for p in named_products(layer, "logits")]
    [('logits', 2, 4, 4)]
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind of product {kind!r}: it is one of {', '.join(get_args(Kind))}.")
    if kind in ("update", "merged") and (example or keywords):
        raise ValueError(f"adapters are told without an example: named_products(model, {kind!r}) is all.")
    if kind == "normalized" and not (example or keywords):
        raise ValueError("which normalization follows which layer shows on an example: give the model's arguments too.")
    if sharded := next((name for name, p in model.named_parameters() if is_sharded(p)), None):
        raise ValueError(
            f"parameter {sharded!r} is sharded (a DTensor), which is not supported for products: act on the factors, "
            "whose norms bound that of the product."
        )
    with undisturbed(model), torch.inference_mode(False), torch.no_grad():
        if kind == "logits":
            return logits(model, example, keywords)
        if kind == "normalized":
            return normalized(model, example, keywords)
        return adapters(model, merged=kind == "merged")


def weights_of(model: nn.Module | Sequence[Weight], **settings: Any) -> list[Weight]:
    """Those of a model by its ``settings`` (`named_weights`), or what was given in place of a model, which takes none.

    Raises:
        TypeError: Neither a module nor weights and products.
        ValueError: Settings beside products, none at all, or two of one name.
    """
    if isinstance(model, nn.Module):
        return named_weights(model, **settings)
    weights = list(model) if isinstance(model, Sequence) else [model]
    if not all(isinstance(w, Weight) for w in weights):
        raise TypeError(
            f"the model is a {type(model).__name__}: give the nn.Module itself, not its parameters, or a list of what "
            "named_weights and named_products return."
        )
    defaults = {"select": None, "map": "matrix", "input_size": None, "embeddings": False}
    given = [name for name, value in settings.items() if value != defaults[name]]
    if given:
        raise ValueError(f"{given[0]} is for the weights of a model: give it to named_weights, not beside a list.")
    names = [w.name for w in weights]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} is in the list twice.")
    if not weights:
        raise ValueError("the list of weights and products is empty: there is nothing to act on.")
    return weights

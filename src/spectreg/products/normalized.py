"""Layers with a batch normalization after them, and diag(γ/√(var + ε))·W of each as a product."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from spectreg.maps.behaviour import LAYERS, calls_torch, has_forward_of
from spectreg.maps.diagonal import DiagonalMap
from spectreg.maps.matrix import MatrixMap
from spectreg.maps.product import Factor, ProductMap
from spectreg.weights.kinds import maps_of
from spectreg.weights.module_names import named_modules
from spectreg.weights.product import Product
from spectreg.weights.reading import read_weight
from spectreg.weights.selection import Weight

NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Pair(NamedTuple):
    """A layer and the normalization of its output, with their names."""

    name: str
    layer: nn.Module
    other: str
    norm: _BatchNorm

    @property
    def map(self) -> MatrixMap:
        """The matrix that the weight of the layer is.

        Raises:
            ValueError: The two are no product with it.
        """
        norm, layer = self.norm, self.layer
        if norm.running_var is None or not has_forward_of(norm, NORMALIZATIONS):
            raise ValueError(
                f"{self.other!r} ({type(norm).__name__}) has no running statistics or a forward of its own: its scale "
                "is no constant, and there is no one map to measure."
            )
        if not calls_torch(layer, LAYERS):
            raise ValueError(
                f"{self.name!r} ({type(layer).__name__}) has a forward or a hook of its own: it is no product with W."
            )
        m = maps_of(layer, "weight", read_weight(layer, "weight"))["matrix"]
        assert isinstance(m, MatrixMap)
        return m


def normalized(model: nn.Module, example: tuple[Any, ...], keywords: dict[str, Any]) -> list[Product]:
    """The product of every layer with the batch normalization after it."""
    return [product_of(pair) for pair in followed(model, *example, **keywords)]


def product_of(pair: Pair) -> Product:
    m, n = pair.map, pair.norm.num_features
    W = Weight(f"{pair.name}.weight".lstrip("."), pair.layer, "weight", m, m.shape)
    root = DiagonalMap(n, m.blocks, pair.norm.eps)
    parts = [W, Weight(f"{pair.other}.running_var", pair.norm, "running_var", root, (n,))]
    chain = [Factor(0, m), Factor(1, root)]
    if pair.norm.affine:
        scale = DiagonalMap(n, m.blocks)
        parts.append(Weight(f"{pair.other}.weight", pair.norm, "weight", scale, (n,)))
        chain.append(Factor(2, scale, share=1.0))
    whole = ProductMap((tuple(chain),), m.outputs, m.inputs, m.blocks, m.norm)
    shapes = tuple(part.shape for part in parts)
    return Product(f"{pair.name}.normalized".lstrip("."), pair.layer, "", whole, shapes, parts=tuple(parts))


def followed(model: nn.Module, *example: Any, **keywords: Any) -> list[Pair]:
    """Each layer whose output a batch normalization takes as it is, with that; in the order of the pass."""
    made: dict[int, tuple[Tensor, str, nn.Module, int]] = {}  # the tensor is held, so that its id is no other's
    pairs: dict[str, Pair] = {}

    def give(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            made[id(output)] = (output, name, module, output._version)

        return hook

    def take(name: str) -> Callable[..., None]:
        def hook(module: _BatchNorm, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            x = inputs[0] if inputs else keywords["input"]
            _, by, layer, version = made.get(id(x), (x, "", None, 0))
            if layer is None or version != x._version:
                return
            if isinstance(layer, nn.Linear) and x.ndim != 2:
                raise ValueError(
                    f"{name!r} normalizes the second of {x.ndim} dimensions, {by!r} gives the last: it scales no rows."
                )
            if by in pairs and pairs[by].other != name:
                raise ValueError(f"{by!r} is followed by {pairs[by].other!r} and by {name!r}: it is no one product.")
            pairs[by] = Pair(by, layer, name, module)

        return hook

    handles = []
    for name, module in named_modules(model):
        if isinstance(module, nn.Linear | _ConvNd):
            handles.append(module.register_forward_hook(give(name)))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(take(name), with_kwargs=True))
    try:
        model(*example, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    if not pairs:
        raise ValueError(
            f"in {type(model).__name__} no batch normalization takes the output of a linear layer or convolution as it "
            "is: there is no product of the two. singular_values measures the weights alone."
        )
    return list(pairs.values())

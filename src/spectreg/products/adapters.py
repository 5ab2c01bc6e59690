"""Low-rank adapters, told by their attributes, and sBA or W + sBA of each as a product."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectreg.linalg.directions import gaussian_like
from spectreg.linalg.products import in_double
from spectreg.maps.behaviour import calls_torch, close
from spectreg.maps.diagonal import DiagonalMap
from spectreg.maps.matrix import MatrixMap
from spectreg.maps.product import Chain, Factor, ProductMap
from spectreg.weights.module_names import named_modules
from spectreg.weights.product import Product
from spectreg.weights.roles import is_stored_transposed
from spectreg.weights.selection import Weight

OTHER = (
    "does not compute W + sBA (DoRA, AdaLoRA or another variant, a hook): merge the adapter into its weight, and "
    "measure that with singular_values."
)
BASES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
NONE_ACTS = (
    "has no active adapter: no module with base_layer, lora_A, lora_B and scaling, or all are switched off "
    "(set_adapter, enable_adapter_layers). singular_values measures weights without."
)


@dataclass(frozen=True)
class LowRank:
    """W as it is stored, in rows of outputs, and B·A, the sum of all that acts, which may be merged into W already."""

    W: Float[Tensor, "outputs inputs"]
    B: Float[Tensor, "outputs rank"]
    A: Float[Tensor, "rank inputs"]
    merged: bool


def adapters(model: nn.Module, merged: bool) -> list[Product]:
    """sBA of every adapted layer, summed over its active adapters; with the weight that it adapts if ``merged``."""
    layers = [(name, layer) for name, layer in named_modules(model) if is_adapted(layer) and acting(layer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} {NONE_ACTS}")
    return [product_of(name, layer, merged) for name, layer in layers]


def product_of(name: str, layer: Any, merged: bool) -> Product:
    if low_rank(name, layer).merged:
        raise ValueError(f"the adapters of {name!r} are merged into its weight: unmerge them before they are trained.")
    active = tuple(acting(layer))
    parts: list[Any] = []
    chains: list[Chain] = []
    for adapter in active:
        A, B = factors_of(name, layer, adapter)
        n, scale = len(parts), DiagonalMap(B.map.outputs)
        chains.append((Factor(n, A.map, share=0.5), Factor(n + 1, B.map, share=0.5), Factor(n + 2, scale)))
        parts += [A, B, Scaling(f"{name}.{adapter}.scaling", layer, adapter, active)]
    if merged:
        base = layer.base_layer
        shape = tuple(base.weight.shape)
        turned = isinstance(base, nn.Embedding) or is_stored_transposed(base, "weight", shape)
        W = Weight(f"{name}.weight", base, "weight", MatrixMap(shape, layout="columns" if turned else "rows"), shape)
        chains.append((Factor(len(parts), W.map, share=1.0),))
        parts.append(W)
    m = ProductMap(tuple(chains), parts[1].map.outputs, parts[0].map.inputs)
    kind = "merged" if merged else "update"
    shapes = tuple(tuple(part.tensor.shape) for part in parts)
    return Product(f"{name}.{kind}".lstrip("."), layer, "", m, shapes, parts=tuple(parts))


def factors_of(name: str, layer: Any, adapter: str) -> list[Weight]:
    """A and B of one adapter."""
    if adapter in layer.lora_A:
        places = [(layer.lora_A[adapter], "weight"), (layer.lora_B[adapter], "weight")]
    else:
        places = [(layer.lora_embedding_A, adapter), (layer.lora_embedding_B, adapter)]
    shapes = [tuple(W.shape) for W in pair(layer, adapter)]
    return [
        Weight(f"{name}.{adapter}.{letter}", *place, MatrixMap(shape), shape)
        for letter, place, shape in zip("AB", places, shapes, strict=True)
    ]


@dataclass(frozen=True)
class Scaling:
    """The number by which an adapter is multiplied, read anew each time, as long as the same adapters act."""

    name: str
    module: nn.Module
    adapter: str
    active: tuple[str, ...]
    attribute: str = "scaling"
    computed: bool = False

    @property
    def tensor(self) -> Float[Tensor, ""]:
        """The number as it is now.

        Raises:
            RuntimeError: Other adapters are active now, or these are merged.
        """
        layer: Any = self.module
        now = tuple(acting(layer))
        if now != self.active or getattr(layer, "merged_adapters", []):
            raise RuntimeError(
                f"{self.name!r}: the adapters {list(self.active)} were active when this was built, and now "
                f"{list(now)} are{', merged' if now == self.active else ''}. Activate these, or build it anew."
            )
        return torch.tensor(float(layer.scaling[self.adapter]), dtype=torch.float64, device="cpu")


def is_adapted(layer: nn.Module) -> bool:
    """Whether it has the attributes of a low-rank adapter."""
    return isinstance(getattr(layer, "base_layer", None), nn.Module) and all(
        hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling", "active_adapters")
    )


def low_rank(name: str, layer: Any) -> LowRank:
    """The factors of what acts; refuses what does not act as their sum."""
    W, active, merged = base_weight(name, layer), acting(layer), set(getattr(layer, "merged_adapters", []))
    if merged and not set(active) <= merged:
        raise ValueError(f"{name!r} has some of its active adapters merged and others not: merge all, or unmerge.")
    if any(a in layer.lora_A and not isinstance(layer.lora_A[a], nn.Module) for a in active):
        raise ValueError(f"{name!r} ({type(layer).__name__}) {OTHER}")
    pairs = [(layer.scaling[a] * in_double(B), in_double(A)) for a in active for A, B in [pair(layer, a)]]
    B, A = torch.cat([b.flatten(1) for b, _ in pairs], 1), torch.cat([a.flatten(1) for _, a in pairs])
    if (len(B), A.shape[1]) != tuple(W.shape):
        raise ValueError(f"{name!r}: factors of shapes {tuple(A.shape)} and {tuple(B.shape)} fit no {tuple(W.shape)}.")
    if not merged and not acts_as_sum(layer, active):
        raise ValueError(f"{name!r} ({type(layer).__name__}) {OTHER}")
    return LowRank(W, B, A, bool(merged))


def acting(layer: Any) -> list[str]:
    """The adapters of ``layer`` that are switched on."""
    off = getattr(layer, "disable_adapters", False)
    return [] if off else [a for a in layer.active_adapters if a in layer.scaling]


def pair(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A (rank × inputs) and B (outputs × rank), of an embedding the other way round."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


def base_weight(name: str, layer: Any) -> Float[Tensor, "outputs inputs"]:
    base = layer.base_layer
    weight = getattr(base, "weight", None)
    turned = isinstance(weight, Tensor) and is_stored_transposed(base, "weight", tuple(weight.shape))
    known = turned or (
        calls_torch(base, BASES) and getattr(base, "groups", 1) == 1 and not getattr(base, "max_norm", 0)
    )
    if not known or hasattr(layer, "parameter_name"):
        raise ValueError(
            f"{name!r} adapts {base}: only linear layers, embeddings and ungrouped convolutions of torch and "
            "the Conv1D of transformers are known. Merge the adapter, and measure that with singular_values."
        )
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() == 1:
        kind = getattr(weight, "dtype", type(weight).__name__)
        raise ValueError(f"{name!r} adapts a quantized weight ({kind}): load the base in bfloat16 or float32.")
    W = in_double(weight)
    return W.T if turned or isinstance(base, nn.Embedding) else W.flatten(1)


def acts_as_sum(layer: Any, active: list[str]) -> bool:
    """Whether random inputs give what the base gives plus what the factors do."""
    base = layer.base_layer
    x = example(base)
    if any(not same_place(layer.lora_A[a], base) for a in active if isinstance(base, _ConvNd)):
        return False
    try:
        given = layer(x)
        expected = base(x) + sum(change(layer, a, x) for a in active)
    except Exception:  # the layer's own code, which can raise anything
        return False
    return close(given, expected)


def change(layer: Any, adapter: str, x: Tensor) -> Tensor:
    A, B = pair(layer, adapter)
    if isinstance(layer.base_layer, nn.Embedding):
        return layer.scaling[adapter] * (A.T[x] @ B.T)
    x = x.to(A.dtype)
    return layer.scaling[adapter] * layer.lora_B[adapter](layer.lora_A[adapter](x))


def same_place(A: Any, base: _ConvNd) -> bool:
    """Whether the first factor of a convolution meets the same inputs as the base."""
    return all(
        getattr(A, n) == getattr(base, n) for n in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    )


def example(base: Any) -> Tensor:
    """Random inputs of the base: rows, rows of a table, or what a kernel covers."""
    if isinstance(base, nn.Embedding):
        return torch.arange(min(4, base.num_embeddings), device=base.weight.device)
    sizes: tuple[int, ...] = ()
    if isinstance(base, _ConvNd):
        sizes = tuple(d * (k - 1) + 1 for k, d in zip(base.kernel_size, base.dilation, strict=True))
    inputs = base.weight.shape[1 if isinstance(base, nn.Linear | _ConvNd) else 0]
    return gaussian_like(base.weight.new_empty(2, inputs, *sizes), torch.Generator().manual_seed(0))

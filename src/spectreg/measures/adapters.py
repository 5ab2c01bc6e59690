"""Measure: the norms of low-rank adapters, alone and together with the weights that they adapt."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectreg.linalg.directions import gaussian_like, own_generator
from spectreg.linalg.lanczos import Goal
from spectreg.linalg.products import in_double, largest_singular_value, norm_of_product
from spectreg.maps.behaviour import calls_torch, close
from spectreg.measures._model import as_found, refuse_sharded
from spectreg.weights.module_names import named_modules
from spectreg.weights.roles import is_stored_transposed

STARTS, MAX_PRODUCTS = 3, 400
OTHER = (
    "does not compute W + sBA (DoRA, AdaLoRA or another variant, a hook): merge the adapter into its weight, and "
    "measure that with singular_values."
)
BASES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


@dataclass(frozen=True)
class AdapterNorm:
    """Of one adapted layer: ``update`` = ‖sBA‖₂, exact to rounding, and ``merged`` = ‖W + sBA‖₂.

    s is α/r, or as the layer scales; several active adapters are summed. ``merged`` is found from below: a singular
    value lies within ``residual`` of it; ``products`` counts those with the factors, ``converged``: the residual met
    the tolerance, from several starts.
    """

    update: float
    merged: float
    residual: float
    products: int
    converged: bool


@dataclass(frozen=True)
class Factors:
    """W as it is stored, in rows of outputs, and B·A, the sum of all that acts, which may be merged into W already."""

    W: Float[Tensor, "outputs inputs"]
    B: Float[Tensor, "outputs rank"]
    A: Float[Tensor, "rank inputs"]
    merged: bool


def adapter_norms(
    model: nn.Module, *, tolerance: float = 1e-4, generator: torch.Generator | None = None
) -> dict[str, AdapterNorm]:
    """The norms of the active adapters of ``model`` by the name of the layer, in the units of its weight.

    Adapted layers are told as those of peft are: ``base_layer`` (linear, ``Conv1D`` of transformers, convolution or
    embedding), ``lora_A`` and ``lora_B`` and ``scaling`` by the adapter's name. Whether a layer acts as W + sBA is
    tried on random inputs. BA is never formed. The model is left as found.

    Args:
        tolerance: Share of ``merged`` that its residual may be.
        generator: Draws the first vectors; by default a private one with seed 0.

    Raises:
        ValueError: No adapter; one whose layer computes something else (DoRA and other variants), is quantized or
            switched off.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}: use 0 < tolerance < 1.")
    generator, norms = own_generator(generator), {}
    refuse_sharded(model)
    with as_found(model), torch.no_grad():
        for name, layer in named_modules(model):
            if is_adapted(layer) and acting(layer):
                norms[name] = norm_of_adapted(factors_of(name, layer), Goal(1, tolerance, MAX_PRODUCTS), generator)
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no active adapter: no module with base_layer, lora_A, lora_B and scaling, or "
            "all are switched off (set_adapter, enable_adapter_layers). singular_values measures weights without."
        )
    return norms


def is_adapted(layer: nn.Module) -> bool:
    """Whether it has the attributes of a low-rank adapter."""
    return isinstance(getattr(layer, "base_layer", None), nn.Module) and all(
        hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling", "active_adapters")
    )


def norm_of_adapted(f: Factors, goal: Goal, generator: torch.Generator) -> AdapterNorm:
    update = norm_of_product(f.B.T, f.A).item()
    scale = max(f.W.abs().max().item(), update) or 1.0  # squares could else under- or overflow
    W, B = f.W / scale, f.B / scale * (not f.merged)

    def forward(x: Float[Tensor, "starts 1 inputs"]) -> Float[Tensor, "starts 1 outputs"]:
        return x @ W.T + (x @ f.A.T) @ B.T

    def adjoint(y: Float[Tensor, "starts 1 outputs"]) -> Float[Tensor, "starts 1 inputs"]:
        return y @ W + (y @ B) @ f.A

    start = gaussian_like(W.new_empty(STARTS, 1, W.shape[1]), generator)
    found = largest_singular_value(forward, adjoint, start, goal)
    return AdapterNorm(update, scale * found.values[0], scale * found.residuals[0], found.products, found.converged)


def factors_of(name: str, layer: Any) -> Factors:
    """The factors of what acts; refuses what does not act as their sum."""
    W, active, merged = base_weight(name, layer), acting(layer), set(getattr(layer, "merged_adapters", ()))
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
    return Factors(W, B, A, bool(merged))


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

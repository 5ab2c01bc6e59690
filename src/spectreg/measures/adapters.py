"""Measure: the norms of low-rank adapters, alone and together with the weights that they adapt."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectreg.linalg.directions import gaussian_like, own_generator
from spectreg.linalg.lanczos import Goal
from spectreg.linalg.products import largest_singular_value, norm_of_product
from spectreg.measures._model import as_found, refuse_sharded
from spectreg.products.adapters import NONE_ACTS, LowRank, acting, is_adapted, low_rank
from spectreg.weights.module_names import named_modules

STARTS, MAX_PRODUCTS = 3, 400


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
                norms[name] = norm_of_adapted(low_rank(name, layer), Goal(1, tolerance, MAX_PRODUCTS), generator)
    if not norms:
        raise ValueError(f"{type(model).__name__} {NONE_ACTS}")
    return norms


def norm_of_adapted(f: LowRank, goal: Goal, generator: torch.Generator) -> AdapterNorm:
    update = norm_of_product(f.B.T, f.A).item()
    scale = max(f.W.abs().max().item(), update) or 1.0  # squares could else under- or overflow
    W, B = f.W / scale, f.B / scale * (not f.merged)

    def forward(x: Float[Tensor, "starts 1 inputs"]) -> Float[Tensor, "starts 1 outputs"]:
        return x @ W.T + (x @ f.A.T) @ B.T

    def adjoint(y: Float[Tensor, "starts 1 outputs"]) -> Float[Tensor, "starts 1 inputs"]:
        return y @ W + (y @ B) @ f.A

    start = gaussian_like(W.new_empty(STARTS, 1, W.shape[1]), generator)
    top = largest_singular_value(forward, adjoint, start, goal)
    return AdapterNorm(update, scale * top.values[0], scale * top.residuals[0], top.products, top.converged)

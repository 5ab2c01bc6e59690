"""Measure: the norm of a layer together with the batch normalization after it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from spectreg.linalg.directions import gaussian_like, own_generator
from spectreg.linalg.lanczos import Eigenvalues, Goal
from spectreg.linalg.products import in_double, largest_singular_value
from spectreg.maps.behaviour import LAYERS, calls_torch, has_forward_of
from spectreg.maps.matrix import MatrixMap
from spectreg.measures._model import as_found, refuse_sharded
from spectreg.weights.kinds import maps_of
from spectreg.weights.module_names import named_modules
from spectreg.weights.reading import read_weight

STARTS, MAX_PRODUCTS = 3, 400
NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class NormalizedNorm:
    """‖diag(γ/√(var+ε))·W‖₂ of a layer and the normalization after it, as one map in evaluation mode.

    ``alone`` is ‖W‖₂. Both are found from below: a singular value lies within ``residual`` of ``value``; ``products``
    counts those with the factors of both, ``converged``: the residuals met the tolerance, from several starts.
    """

    normalization: str
    value: float
    alone: float
    residual: float
    products: int
    converged: bool


def normalized_norms(
    model: nn.Module, *example: Any, tolerance: float = 1e-4, generator: torch.Generator | None = None, **keywords: Any
) -> dict[str, NormalizedNorm]:
    """The norm of every layer with the batch normalization after it, by the name of the layer's weight.

    Which follows which is read off a forward pass of ``example`` in evaluation mode: the normalization of the very
    tensor that a linear layer or a convolution gives. W is the matrix that ``named_weights`` takes (of a convolution,
    outputs against inputs times kernel; of a grouped one, the largest group). The scaled weight is never formed. The
    model is left as found.

    Args:
        tolerance: Share of each norm that its residual may be.
        generator: Draws the first vectors; by default a private one with seed 0.

    Raises:
        ValueError: No layer with a batch normalization after it; one without running statistics, whose scale is no
            constant; a layer with a forward or hook of its own.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=0.0))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.eye(2))
    ...     _ = model[1].weight.copy_(torch.tensor([1.0, 3.0]))
    >>> norm = normalized_norms(model, torch.zeros(1, 2))["0.weight"]
    >>> round(norm.value, 4), round(norm.alone, 4)
    (3.0, 1.0)
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}: use 0 < tolerance < 1.")
    generator, goal = own_generator(generator), Goal(1, tolerance, MAX_PRODUCTS)
    refuse_sharded(model)
    with as_found(model), torch.no_grad():
        pairs = followed(model, *example, **keywords)
        norms = {
            f"{name}.weight".lstrip("."): norm_of_both(name, layer, other, norm, goal, generator)
            for name, layer, other, norm in pairs
        }
    if not norms:
        raise ValueError(
            f"in {type(model).__name__} no batch normalization takes the output of a linear layer or convolution as it "
            "is: there is no product to measure. singular_values measures the weights alone."
        )
    return norms


def followed(model: nn.Module, *example: Any, **keywords: Any) -> list[tuple[str, nn.Module, str, _BatchNorm]]:
    """Each layer whose output a batch normalization takes as it is, with that; in the order of the pass."""
    made: dict[int, tuple[Tensor, str, nn.Module, int]] = {}  # the tensor is held, so that its id is no other's
    pairs: dict[str, tuple[str, nn.Module, str, _BatchNorm]] = {}

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
            if by in pairs and pairs[by][2] != name:
                raise ValueError(f"{by!r} is followed by {pairs[by][2]!r} and by {name!r}: it is no one product.")
            pairs[by] = by, layer, name, module

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
    return list(pairs.values())


def norm_of_both(
    name: str, layer: nn.Module, other: str, norm: _BatchNorm, goal: Goal, generator: torch.Generator
) -> NormalizedNorm:
    if norm.running_var is None or not has_forward_of(norm, NORMALIZATIONS):
        raise ValueError(
            f"{other!r} ({type(norm).__name__}) has no running statistics or a forward of its own: its scale is no "
            "constant, and there is no one map to measure."
        )
    if not calls_torch(layer, LAYERS):
        raise ValueError(
            f"{name!r} ({type(layer).__name__}) has a forward or a hook of its own: it is no product with W."
        )
    W = read_weight(layer, "weight").detach()
    m = maps_of(layer, "weight", W)["matrix"]
    assert isinstance(m, MatrixMap)
    gamma = in_double(norm.weight) if norm.weight is not None else 1.0
    scale = gamma * torch.rsqrt(in_double(norm.running_var) + norm.eps)
    W = in_double(W)
    size = W.abs().max().item() or 1.0  # squares could else under- or overflow
    values = [scaled_norm(m, W / size, s, goal, generator) for s in (scale, torch.ones_like(scale))]
    (value, residual), (alone, rest) = ((size * v.values[0], size * v.residuals[0]) for v in values)
    converged = all(v.converged for v in values)
    return NormalizedNorm(other, value, alone, max(residual, rest), sum(v.products for v in values), converged)


def scaled_norm(m: MatrixMap, W: Tensor, scale: Tensor, goal: Goal, generator: torch.Generator) -> Eigenvalues:
    """‖diag(scale)·W‖₂ of the largest block; ``scale`` has a number for each row of all blocks."""

    def forward(x: Float[Tensor, "starts blocks inputs"]) -> Float[Tensor, "starts outputs"]:
        return scale * m.forward(W, x.flatten(1))

    def adjoint(y: Float[Tensor, "starts outputs"]) -> Float[Tensor, "starts blocks inputs"]:
        return m.adjoint(W, scale * y).unflatten(1, (m.blocks, m.inputs))

    return largest_singular_value(forward, adjoint, start_of(m, W, generator), goal)


def start_of(m: MatrixMap, W: Tensor, generator: torch.Generator) -> Float[Tensor, "starts blocks inputs"]:
    return gaussian_like(W.new_empty(STARTS, m.blocks, m.inputs), generator)

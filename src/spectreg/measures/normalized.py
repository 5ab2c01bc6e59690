"""Measure: the norm of a layer together with the batch normalization after it."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectreg.linalg.directions import gaussian_like, own_generator
from spectreg.linalg.lanczos import Eigenvalues, Goal
from spectreg.linalg.products import in_double, largest_singular_value
from spectreg.maps.matrix import MatrixMap
from spectreg.measures._model import as_found, refuse_sharded
from spectreg.measures._nested import copied
from spectreg.products.normalized import Pair, followed
from spectreg.weights.reading import read_weight

STARTS, MAX_PRODUCTS = 3, 400


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
        return {
            f"{pair.name}.weight".lstrip("."): norm_of_both(pair, goal, generator)
            for pair in followed(model, *copied(example), **copied(keywords))
        }


def norm_of_both(pair: Pair, goal: Goal, generator: torch.Generator) -> NormalizedNorm:
    m, norm = pair.map, pair.norm
    W = read_weight(pair.layer, "weight").detach()
    assert norm.running_var is not None
    gamma = in_double(norm.weight) if norm.weight is not None else 1.0
    scale = gamma * torch.rsqrt(in_double(norm.running_var) + norm.eps)
    W = in_double(W)
    size = W.abs().max().item() or 1.0  # squares could else under- or overflow
    values = [scaled_norm(m, W / size, s, goal, generator) for s in (scale, torch.ones_like(scale))]
    (value, residual), (alone, rest) = ((size * v.values[0], size * v.residuals[0]) for v in values)
    converged = all(v.converged for v in values)
    return NormalizedNorm(pair.other, value, alone, max(residual, rest), sum(v.products for v in values), converged)


def scaled_norm(m: MatrixMap, W: Tensor, scale: Tensor, goal: Goal, generator: torch.Generator) -> Eigenvalues:
    """‖diag(scale)·W‖₂ of the largest block; ``scale`` has a number for each row of all blocks."""

    def forward(x: Float[Tensor, "starts blocks inputs"]) -> Float[Tensor, "starts outputs"]:
        return scale * m.forward(W, x.flatten(1))

    def adjoint(y: Float[Tensor, "starts outputs"]) -> Float[Tensor, "starts blocks inputs"]:
        return m.adjoint(W, scale * y).unflatten(1, (m.blocks, m.inputs))

    return largest_singular_value(forward, adjoint, start_of(m, W, generator), goal)


def start_of(m: MatrixMap, W: Tensor, generator: torch.Generator) -> Float[Tensor, "starts blocks inputs"]:
    return gaussian_like(W.new_empty(STARTS, m.blocks, m.inputs), generator)

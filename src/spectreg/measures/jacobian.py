"""Measure: the norms of the local Jacobian, W_{Θ,x} in Section 3.1 of arXiv:1705.10941."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from spectreg.linalg.directions import along, gaussian_like, lengths, own_generator, unit
from spectreg.measures._examples import example_dimension
from spectreg.measures._inputs import differentiable_input
from spectreg.measures._model import as_found

FEW_OUTPUTS = 16  # up to here a backward for each output beats an iteration


@dataclass(frozen=True)
class JacobianNorm:
    """‖J(x)‖₂ of each example, from below.

    A singular value of J(x) lies within ``residual`` of ``value``. ``iterations`` counts products with J and Jᵀ;
    it is 0, and the residual too, where J was formed.
    """

    value: Float[Tensor, " batch"]
    residual: Float[Tensor, " batch"]
    iterations: int
    converged: Bool[Tensor, " batch"]


@dataclass(frozen=True)
class JacobianFrobeniusNorm:
    """‖J(x)‖_F of each example; ``standard_error`` is that of the projections, 0 where J was formed."""

    value: Float[Tensor, " batch"]
    standard_error: Float[Tensor, " batch"]


def jacobian_norm(
    model: nn.Module,
    x: Shaped[Tensor, "batch ..."],
    *,
    exact: bool | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    generator: torch.Generator | None = None,
) -> JacobianNorm:
    """The spectral norm of the Jacobian of ``model`` at each example of ``x``, in evaluation mode.

    By power iteration on JᵀJ, all examples at once, on one kept graph: a product with J or Jᵀ costs about a backward
    to the input. The model is left as found.

    Args:
        x: Examples along the first dimension; none may influence another's output.
        exact: Form J, one backward an output, and take its norm; by default for up to 16 outputs.
        tolerance: Share of the value that the residual may be.
        generator: Draws the first vectors; by default a private one with seed 0.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> jacobian_norm(model, torch.zeros(1, 2)).value
    tensor([3.])
    """
    if not 0 < tolerance < 1 or max_iterations < 1:
        raise ValueError(
            f"tolerance is {tolerance}, max_iterations {max_iterations}: use 0 < tolerance < 1, at least 1."
        )
    with as_found(model), torch.enable_grad():
        x = differentiable_input(x)
        y = flat_output(model(x.clone()), x)
        refuse_mixed(x, y)
        if exact or (exact is None and y.shape[1] <= FEW_OUTPUTS):
            J = torch.stack([row.reshape(len(x), -1) for row in jacobian_rows(y, x)], 1).double()
            finite = J.isfinite().flatten(1).all(1)
            short = torch.where(finite[:, None, None], J if J.shape[1] <= J.shape[2] else J.mT, 0.0)
            norms = torch.linalg.eigvalsh(short @ short.mT)[:, -1].clamp_min(0).sqrt()
            value = torch.where(finite, norms, torch.nan).to(x.dtype)
            return JacobianNorm(value, torch.zeros_like(value), 0, finite)
        v = unit(gaussian_like(x, own_generator(generator)))
        return power_iteration(y, x, v, tolerance, max_iterations)


def power_iteration(y: Tensor, x: Tensor, v: Tensor, tolerance: float, max_iterations: int) -> JacobianNorm:
    """Power iteration for each example with the products of one graph, forward ones by differentiating twice.

    A residual that is small and grows is none: most directions may be stretched alike, as by a residual network, and
    one that is stretched more only shows after some steps.
    """
    weights = torch.zeros_like(y, requires_grad=True)
    pulled = pull_back(y, x, weights, create_graph=True)  # linear in weights
    iterations, last, rounding = 0, y.new_zeros(len(y)), 30 * torch.finfo(y.dtype).eps
    settled = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    while iterations < max_iterations:
        iterations += 1
        (u,) = torch.autograd.grad(pulled, weights, v, retain_graph=True)
        sigma = lengths(u)
        w = pull_back(y, x, unit(u))
        residual = lengths(w - along(v, sigma) * v)
        small = residual <= tolerance * sigma
        settled |= small & (residual <= torch.maximum(last, rounding * sigma))
        converged, last = settled & small, residual
        if converged.all():
            break
        v = unit(w)
    return JacobianNorm(sigma, residual, iterations, converged)


def jacobian_frobenius_norm(
    model: nn.Module,
    x: Shaped[Tensor, "batch ..."],
    *,
    projections: int | None = None,
    generator: torch.Generator | None = None,
) -> JacobianFrobeniusNorm:
    """The Frobenius norm of the Jacobian of ``model`` at each example of ``x``, in evaluation mode.

    Args:
        projections: Random directions of the output to pull back; by default all outputs one by one, exactly.
        generator: Draws the directions; by default a private one with seed 0.

    >>> jacobian_frobenius_norm(nn.Flatten(), torch.zeros(1, 2, 2)).value
    tensor([2.])
    """
    with as_found(model), torch.enable_grad():
        x = differentiable_input(x)
        y = flat_output(model(x.clone()), x)
        refuse_mixed(x, y)
        rows = jacobian_rows(y, x, projections, generator)
        norms = torch.stack([lengths(row) for row in rows], 1)
    value = lengths(norms)
    if projections is None:
        return JacobianFrobeniusNorm(value, torch.zeros_like(value))
    value = value / math.sqrt(projections)
    squares = (norms / along(norms, torch.where(value > 0, value, 1.0))).square()  # of value², whose units may be tiny
    spread = squares.std(1) if projections > 1 else torch.full_like(value, math.nan)
    return JacobianFrobeniusNorm(value, value * spread / (2 * math.sqrt(projections)))


def flat_output(y: Any, x: Tensor) -> Float[Tensor, "batch outputs"]:
    """The output ``y``, flat for each example of ``x``; an error unless it has one for each."""
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the model gave {shape} for {len(x)} examples: a Jacobian needs one output for each.")
    if not len(x) or not y.is_floating_point():
        given = f"outputs of {y.dtype}" if len(x) else "no example"
        raise ValueError(f"the model gave {given}: the Jacobian is that of real outputs at one example or more.")
    return y.flatten(1) if y.ndim > 1 else y[:, None]


def refuse_mixed(x: Tensor, y: Tensor) -> None:
    """Raise where an output depends on several examples: the rows of all, added up, would be taken for those of one."""
    if len(x) > 1 and example_dimension(x, y) != 0:
        raise ValueError(
            "an output depends on more than one example along the first dimension (time first? batch normalization "
            "without running statistics?): no example has a Jacobian of its own. Give a model that takes examples "
            "first, or one example at a time."
        )


def pull_back(y: Tensor, x: Tensor, u: Tensor, create_graph: bool = False) -> Tensor:
    """``Jᵀu`` for each example; the graph of ``y`` stays."""
    row = None
    if y.requires_grad:
        (row,) = torch.autograd.grad(y, x, u, retain_graph=True, create_graph=create_graph, allow_unused=True)
    if row is None:
        raise ValueError("the output does not depend on x in a differentiable way: look for detach() or argmax.")
    return row


def jacobian_rows(
    y: Float[Tensor, "batch outputs"],
    x: Tensor,
    projections: int | None = None,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
) -> Iterator[Tensor]:
    """Jᵀu for each example: u every unit vector, or ``projections`` random ones of squared length ``outputs``."""
    if projections is not None and projections < 1:
        raise ValueError(f"projections is {projections}: use at least 1, or leave it out for the exact norm.")
    generator = own_generator(generator)
    count = y.shape[1] if projections is None else projections
    for i in range(count):
        if projections is None:
            u = torch.zeros_like(y)
            u[:, i] = 1
        else:
            u = math.sqrt(y.shape[1]) * unit(gaussian_like(y, generator))
        yield pull_back(y, x, u, create_graph)

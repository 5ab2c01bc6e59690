"""How much a function stretches the distance between two inputs at least: a search among pairs, in float64."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SCALES = (1e-4, 0.03, 1.0, 30.0)


class Apply(nn.Module):
    """A function as a module in float64."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("in_float64", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def largest_stretch(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], seed: int = 0) -> float:
    """The largest |f(x) − f(z)|/|x − z| of pairs near and far, along the top local direction too.

    ``function`` takes one example as a batch of one.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian() -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    points = [torch.zeros(1, *shape, dtype=torch.float64)] + [s * gaussian() for s in SCALES for _ in range(3)]
    largest = 0.0
    for x in points:
        value = function(x)
        directions = [gaussian(), gaussian(), local_direction(function, x)]
        directions += [e.view_as(x) for e in torch.eye(x.numel(), dtype=torch.float64)[:8]]
        for d in directions:
            for scale in SCALES:
                z = x + scale * d / d.norm()
                largest = max(largest, ((function(z) - value).norm() / (z - x).norm()).item())
    return largest


def local_direction(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The direction that the Jacobian at ``x`` stretches most, by its SVD."""
    J = torch.autograd.functional.jacobian(function, x).reshape(-1, x.numel())
    if not J.numel() or not J.isfinite().all():
        return torch.ones_like(x)
    return torch.linalg.svd(J, full_matrices=False).Vh[0].view_as(x)


def matrix_norm(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """The norm of a function that is linear but for a constant, from its matrix."""
    eye = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, 1, *shape)
    zero = function(torch.zeros_like(eye[0]))
    return torch.linalg.matrix_norm(torch.stack([(function(e) - zero).flatten() for e in eye]), 2).item()

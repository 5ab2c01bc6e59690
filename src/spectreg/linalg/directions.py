"""Directions for each example of a batch: lengths, unit vectors, random ones."""

import torch
from jaxtyping import Shaped
from torch import Tensor


def lengths(x: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, " batch"]:
    """The ℓ2 norm of each example, also where squares of its entries would underflow or overflow.

    >>> lengths(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, 4e-30]]))
    tensor([5.0000e+00, 0.0000e+00, 5.0000e-30])
    """
    if x.numel() == 0:
        return x.new_zeros(len(x))
    x = x.reshape(len(x), -1)
    largest = x.detach().abs().amax(1).clamp_min(torch.finfo(x.dtype).tiny)
    return largest * torch.linalg.vector_norm(x / largest[:, None], dim=1)


def length(x: Tensor) -> Tensor:
    """The ℓ2 norm of all of ``x``, as `lengths` takes it."""
    return lengths(x.reshape(1, -1))[0]


def along(x: Tensor, scale: Tensor) -> Tensor:
    """``scale``, one number an example, shaped to multiply ``x``."""
    return scale.reshape(-1, *[1] * (x.ndim - 1))


def unit(x: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
    """Each example divided by its ℓ2 norm; zero where it is zero.

    >>> unit(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))  # the squares would underflow
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    if x[0].numel() == 0:
        return x
    tiny = torch.finfo(x.dtype).tiny
    x = x / along(x, x.detach().abs().reshape(len(x), -1).amax(1).clamp_min(tiny))
    return x / along(x, lengths(x).clamp_min(tiny))


def gaussian_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gaussian numbers in the shape, type and place of ``x``, drawn where the generator lives."""
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a private one with seed 0: a measure never draws from the global one."""
    return torch.Generator().manual_seed(0) if generator is None else generator

"""The tensors that a product of weights is made of."""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factors(tuple[Tensor, ...]):
    """The tensors of a product, with what the power iteration asks of a weight: device, precision, whether trained.

    >>> factors = Factors([torch.zeros(2, 3), torch.zeros(3, 4, dtype=torch.float64)])
    >>> factors.dtype, factors.shape
    (torch.float64, (torch.Size([2, 3]), torch.Size([3, 4])))
    """

    @property
    def device(self) -> torch.device:
        """That of all; a number by itself can stay on the CPU."""
        return next((x.device for x in self if x.ndim), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """What the precisions of all have in common; a number by itself has none."""
        return reduce(torch.promote_types, [x.dtype for x in self if x.ndim])

    @property
    def requires_grad(self) -> bool:
        """Whether any is trained."""
        return any(x.requires_grad for x in self)

    @property
    def is_meta(self) -> bool:
        """Whether any has no values."""
        return any(x.is_meta for x in self)

    @property
    def shape(self) -> tuple[torch.Size, ...]:
        """Of each its own."""
        return tuple(x.shape for x in self)


Value = Tensor | Factors  # what the linear map of a weight multiplies with


class Update(NamedTuple):
    """Where the gradient of a product goes: of each factor into a tensor, times a rate, or nowhere."""

    factors: Factors
    into: tuple[Tensor | None, ...]
    rates: tuple[Any, ...]


Target = Tensor | Update


def tensors_of(W: Value) -> tuple[Tensor, ...]:
    """The weight by itself, or the factors of a product."""
    return tuple(W) if isinstance(W, Factors) else (W,)

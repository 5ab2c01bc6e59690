"""Scalar functions of σ and their slopes."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Penalty(NamedTuple):
    """A scalar function φ of the singular value and its slope φ'; both act elementwise on a tensor of σ."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def square() -> Penalty:
    """φ(σ) = σ²/2, the paper's (Eq. (1) of arXiv:1705.10941)."""
    return Penalty(lambda sigma: sigma * sigma / 2, lambda sigma: sigma)

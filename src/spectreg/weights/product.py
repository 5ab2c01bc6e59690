"""A product of weights, told and read as one weight."""

from dataclasses import dataclass
from typing import Any

from spectreg.maps.factors import Factors
from spectreg.weights.selection import Weight


@dataclass(frozen=True)
class Product(Weight):
    """A product of weights, such as W_QᵀW_K of every head of an attention, as a `Weight` of several tensors.

    ``name`` is that of the module and the kind of the product. ``shape`` has those of the factors, and ``parts`` says
    where each is read: a `Weight`, or what has its ``name``, ``module``, ``attribute``, ``tensor`` and ``computed``.
    """

    shape: tuple[Any, ...]
    parts: tuple[Any, ...] = ()

    @property
    def tensor(self) -> Factors:  # type: ignore[override]
        """The factors as they are now."""
        return Factors(part.tensor for part in self.parts)

    @property
    def computed(self) -> bool:
        """Whether a factor that is trained is no parameter."""
        return any(part.computed and part.tensor.requires_grad for part in self.parts)

    @property
    def factors(self) -> tuple[Any, ...]:
        """What it is made of."""
        return self.parts

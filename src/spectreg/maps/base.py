"""What a linear map has to offer to the power iteration."""

from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Norm = Literal["max", "each"]


@runtime_checkable
class LinearMap(Protocol):
    """What the power iteration needs of a weight: products with it, and the gradient that pairs (u, v) stand for.

    Vectors are rows, one or ``m`` of them at once, each with the ``inputs`` (or ``outputs``) of all blocks side by
    side. Their precision may be higher than the weight's. ``W`` is a tensor, or of a product its `Factors`.
    """

    @property
    def blocks(self) -> int: ...

    @property
    def norm(self) -> Norm: ...

    @property
    def outputs(self) -> int: ...

    @property
    def inputs(self) -> int: ...

    def forward(self, W: Any, v: Float[Tensor, "*m v"]) -> Float[Tensor, "*m u"]:
        """Wv of each row."""
        ...

    def adjoint(self, W: Any, u: Float[Tensor, "*m u"]) -> Float[Tensor, "*m v"]:
        """Wᵀu of each row."""
        ...

    def round_trip(self, W: Any, v: Float[Tensor, "m v"]) -> tuple[Float[Tensor, "m u"], Float[Tensor, "m v"]]:
        """Wv and Wᵀ(Wv) of each row."""
        ...

    def add_outer_(self, G: Any, u: Float[Tensor, "k u"], v: Float[Tensor, "k v"], alpha: float = 1.0) -> None:
        """G += alpha·Σ ∂(uᵀWv)/∂W, in place; the sum is over the rows."""
        ...

    def scale_(self, W: Any, by: Float[Tensor, " some"]) -> None:
        """Multiply each block by its number, or all by one, in place."""
        ...

    def matrices(self, W: Any) -> Float[Tensor, "blocks outputs inputs"]:
        """The blocks as dense matrices, for measures."""
        ...

    def squares(self, W: Any) -> Float[Tensor, " blocks"]:
        """‖W‖_F² of each block."""
        ...

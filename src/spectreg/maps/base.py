"""What a linear map has to offer to the power iteration."""

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Norm = Literal["max", "each"]


@runtime_checkable
class LinearMap(Protocol):
    """What the power iteration needs of a weight: products with it, and the gradient that a pair (u, v) stands for.

    Vectors come and go flat: ``blocks`` × ``inputs`` (or ``outputs``) × ``k`` numbers, for ``k`` pairs at once. Their
    precision may be higher than the weight's.
    """

    @property
    def blocks(self) -> int: ...

    @property
    def norm(self) -> Norm: ...

    @property
    def outputs(self) -> int: ...

    @property
    def inputs(self) -> int: ...

    def forward(self, W: Tensor, v: Float[Tensor, " v"], k: int = 1) -> Float[Tensor, " u"]:
        """Wv."""
        ...

    def adjoint(self, W: Tensor, u: Float[Tensor, " u"], k: int = 1) -> Float[Tensor, " v"]:
        """Wᵀu."""
        ...

    def round_trip(self, W: Tensor, v: Float[Tensor, " v"], u: Float[Tensor, " u"], w: Float[Tensor, " v"]) -> None:
        """Write Wv to ``u`` and Wᵀu to ``w``."""
        ...

    def add_outer_(
        self, G: Tensor, u: Float[Tensor, " u"], v: Float[Tensor, " v"], k: int = 1, alpha: float = 1.0
    ) -> None:
        """G += alpha·∂(uᵀWv)/∂W, in place."""
        ...

    def matrices(self, W: Tensor) -> Float[Tensor, "blocks outputs inputs"]:
        """The blocks as dense matrices, for measures."""
        ...

    def squares(self, W: Tensor) -> Float[Tensor, " blocks"]:
        """‖W‖_F² of each block."""
        ...

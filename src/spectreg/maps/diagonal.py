"""Diagonal maps: the scale of a normalization, its running variance, or one number for all."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.maps.base import Norm


@dataclass(frozen=True)
class DiagonalMap:
    """diag(x), or with an ``eps`` diag(1/√(x + eps)), of a tensor x of ``size`` numbers, or one number for all.

    >>> DiagonalMap(2).forward(torch.tensor([2.0, 3.0]), torch.ones(1, 2))
    tensor([[2., 3.]])
    """

    size: int
    blocks: int = 1
    eps: float | None = None
    norm: Norm = "max"

    @property
    def outputs(self) -> int:
        """Numbers of a block."""
        return self.size // self.blocks

    @property
    def inputs(self) -> int:
        """The same."""
        return self.outputs

    def forward(self, W: Tensor, v: Float[Tensor, "*m v"]) -> Float[Tensor, "*m v"]:
        """Each number times its own."""
        return v * self._values(W, v.dtype)

    def adjoint(self, W: Tensor, u: Float[Tensor, "*m u"]) -> Float[Tensor, "*m u"]:
        """The same."""
        return u * self._values(W, u.dtype)

    def round_trip(self, W: Tensor, v: Float[Tensor, "*m v"]) -> tuple[Float[Tensor, "*m u"], Float[Tensor, "*m v"]]:
        """Both, one after the other."""
        u = self.forward(W, v)
        return u, self.adjoint(W, u)

    def add_outer_(self, G: Tensor, u: Float[Tensor, "k u"], v: Float[Tensor, "k v"], alpha: float = 1.0) -> None:
        """G += alpha·Σ u·v, number by number."""
        if self.eps is not None:
            raise NotImplementedError("a running variance has no gradient.")
        G.add_((u * v).sum(0).view_as(G), alpha=alpha)

    def scale_(self, W: Tensor, by: Float[Tensor, " blocks"]) -> None:
        """Multiply each block by its number, in place."""
        W.mul_(by.to(W.dtype).repeat_interleave(W.numel() // len(by)))

    def matrices(self, W: Tensor) -> Float[Tensor, "blocks outputs inputs"]:
        """The blocks as matrices."""
        return torch.diag_embed(self._values(W, W.dtype).expand(self.size).view(self.blocks, -1))

    def squares(self, W: Tensor) -> Float[Tensor, " blocks"]:
        """The sum of squares of each block."""
        return self._values(W, torch.float64).expand(self.size).square().view(self.blocks, -1).sum(1)

    def _values(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        W = W.to(dtype)
        return W if self.eps is None else torch.rsqrt(W + self.eps)

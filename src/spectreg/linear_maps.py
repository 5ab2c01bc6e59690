"""A weight as the linear map it is: one or more matrix blocks, seen in the weight's own memory."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from jaxtyping import Float
from torch import Tensor

Norm = Literal["max", "each"]


@dataclass(frozen=True)
class MatrixMap:
    """A weight cut into ``blocks`` equal matrices of ``outputs`` rows and ``inputs`` columns.

    The first dimension of the weight holds the rows of all blocks, one block after the other; all other dimensions
    are columns (the paper's b × a·kw·kh for a convolution).

    Args:
        shape: Shape of the weight.
        blocks: Number of matrices: groups of a convolution, gates of an LSTM, heads of an attention.
        norm: ``"max"``: the blocks lie on the diagonal of one map, whose norm is the largest of theirs.
            ``"each"``: every block is a map of its own and is penalized by itself.

    >>> import torch
    >>> MatrixMap((6, 4, 3, 3), blocks=2)
    MatrixMap(shape=(6, 4, 3, 3), blocks=2, norm='max')
    >>> MatrixMap((6, 4, 3, 3), blocks=2).matrices(torch.zeros(6, 4, 3, 3)).shape
    torch.Size([2, 3, 36])
    """

    shape: tuple[int, ...]
    blocks: int = 1
    norm: Norm = "max"

    @property
    def outputs(self) -> int:
        """Rows of one block."""
        return self.shape[0] // self.blocks

    @property
    def inputs(self) -> int:
        """Columns of one block."""
        return prod(self.shape[1:])

    def matrices(self, weight: Tensor) -> Float[Tensor, "blocks outputs inputs"]:
        """The blocks of ``weight``, as a view of its memory where its strides allow."""
        return weight.reshape(self.blocks, self.outputs, self.inputs)

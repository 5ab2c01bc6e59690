"""The norm of a product or a sum of products, from the factors alone."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.linalg.block_lanczos import largest_of_blocks
from spectreg.linalg.lanczos import Eigenvalues, Goal


def norm_of_product(A: Float[Tensor, "*b k m"], B: Float[Tensor, "*b k n"]) -> Float[Tensor, "*b"]:
    """‖AᵀB‖₂ in float64, exact to rounding; nothing larger than A or B is formed.

    With Aᵀ = QR and Bᵀ = PS it is the norm of RSᵀ, which has at most k rows and columns.

    >>> norm_of_product(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0, 0.0]]))
    tensor(10., dtype=torch.float64)
    """
    (R, a), (S, b) = triangle(A), triangle(B)
    return a * b * torch.linalg.matrix_norm(R @ S.mT, 2)


def norm_of(A: Float[Tensor, "*b k m"]) -> Float[Tensor, "*b"]:
    """‖A‖₂ in float64, exact to rounding."""
    R, a = triangle(A)
    return a * torch.linalg.matrix_norm(R, 2)


def triangle(A: Float[Tensor, "*b k m"]) -> tuple[Float[Tensor, "*b l k"], Float[Tensor, "*b"]]:
    """R of Aᵀ = QR, and the largest entry of A, by which it was divided: squares could else under- or overflow."""
    A = in_double(A)
    largest = A.abs().amax((-2, -1))
    size = torch.where(largest > 0, largest, 1.0)
    return torch.linalg.qr((A / size[..., None, None]).mT, mode="r").R, size


def largest_singular_value(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Float[Tensor, "starts blocks n"],
    goal: Goal,
) -> Eigenvalues:
    """The norm of a map of blocks that is known by its products with rows, by Lanczos on AᵀA from several starts.

    ``residuals[0]`` bounds the distance to a singular value, in the units of the norm; ``products`` counts those with
    AᵀA. The largest value is found from below.
    """
    squares, _ = largest_of_blocks(lambda x: adjoint(forward(x)), start, goal)
    value = max(squares.values[0], 0.0) ** 0.5
    residual = squares.residuals[0] / value if value else 0.0
    return Eigenvalues((value,), (residual,), squares.products, squares.converged)


def in_double(x: Tensor) -> Tensor:
    """``x`` in float64, on the CPU where its device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()

"""Largest eigenvalues of a symmetric operator by power iteration, shifted where a negative one dominates."""

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.linalg.lanczos import Eigenvalues, Goal, Operator, fresh_direction, normalised, orthogonalise


def shifted_power(
    A: Operator,
    start: Float[Tensor, " n"],
    goal: Goal,
    generator: torch.Generator,
) -> Eigenvalues:
    """The ``k`` largest eigenvalues of ``A`` by power iteration, one after the other, the found ones projected out.

    Plain power iteration goes to the eigenvalue that is largest in magnitude. Where that is a negative one, the
    iteration goes on with ``A + s`` for s its magnitude, whose dominant eigenvalue is the largest algebraic one of A.

    >>> A = torch.diag(torch.tensor([-9.0, 1.0, 2.0, 4.0]))
    >>> found = shifted_power(A.mv, torch.ones(4), Goal(1, 1e-6, 1000), torch.Generator().manual_seed(0))
    >>> [round(value, 5) for value in found.values]
    [4.0]
    """
    values: list[float] = []
    residuals: list[float] = []
    found = start.new_zeros(0, start.numel())
    products, shift, growth, v = 0, 0.0, 0.0, normalised(start)
    theta = residual = float("nan")
    while products < goal.max_products:
        w = A(v)
        products += 1
        orthogonalise(w, found)
        theta = torch.dot(v, w).item()
        residual = torch.linalg.vector_norm(w - theta * v).item()
        w += shift * v
        length = torch.linalg.vector_norm(w).item()
        settled = abs(length - growth) <= 0.01 * goal.tolerance * length
        growth = length
        if residual <= goal.tolerance * abs(theta) and (theta >= 0 or shift):
            values.append(theta)
            residuals.append(residual)
            if len(values) == goal.k:
                return Eigenvalues(tuple(values), tuple(residuals), products, True)
            found = torch.cat([found, v[None]])
            shift, growth, v = 0.0, 0.0, fresh_direction(start, found, generator)
        elif settled and not shift:  # on a negative eigenvalue, or torn between two of equal size
            shift, growth, v = length, 0.0, fresh_direction(start, found, generator)
        else:
            v = w / length if length else v
    return Eigenvalues((*values, theta), (*residuals, residual), products, False)

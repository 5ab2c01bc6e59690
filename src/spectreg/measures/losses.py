"""A loss of a model and a batch of any form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class BatchLoss:
    """A loss that calls the model itself: for batches of any form, and for losses that only you can count.

    Measures call ``function(model, batch)`` with each batch as the loader gives it, moved to the model's device.

    Args:
        function: Returns ``(loss, count)``: the mean loss, a scalar, and the number of terms that it is the mean of
            (examples, tokens that are not padding, the sum of class weights). The scalar alone will do for one batch.
        input: Key or index of the tensor in the batch that is perturbed, where a measure perturbs one; by default the
            first of a pair, or the only floating point tensor.

    >>> import spectreg, torch
    >>> loss = BatchLoss(lambda model, batch: (model(batch["x"]).square().mean(), len(batch["x"])))
    >>> batches = [{"x": torch.tensor([[1.0], [3.0]])}, {"x": torch.tensor([[2.0]])}]
    >>> spectreg.hessian_top_eigenvalues(torch.nn.Linear(1, 1, bias=False), loss, batches).values  # 2·(1 + 9 + 4)/3
    (9.333...,)
    """

    function: Callable[[Any, Any], Tensor | tuple[Tensor, Any]]
    input: str | int | None = None

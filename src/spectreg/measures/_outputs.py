"""What a model gives while a loss function calls it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectreg.measures._nested import tensors


class Outputs:
    """The outputs that a model has given."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    @property
    def last(self) -> Any:
        if not self.all:
            raise ValueError("BatchLoss: the function did not call the model that it was given.")
        return self.all[-1]


@contextmanager
def output_of(model: nn.Module) -> Iterator[Outputs]:
    """Collects what ``model`` returns while the block runs.

    >>> layer = nn.Flatten()
    >>> with output_of(layer) as outputs:
    ...     _ = layer(torch.zeros(2, 3, 1))
    >>> outputs.last.shape
    torch.Size([2, 3])
    """
    outputs = Outputs()
    handle = model.register_forward_hook(lambda module, inputs, output: outputs.all.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def flat_rows(output: Any, n: int) -> Tensor:
    """All floating point outputs of each of ``n`` examples in one row; an error unless each has its own."""
    floating = [x for x in tensors(output) if x.is_floating_point()]
    shapes = ", ".join(str(tuple(x.shape)) for x in floating)
    if not floating or any(not x.ndim or len(x) != n for x in floating):
        raise ValueError(
            f"the model gave {shapes or type(output).__name__} for {n} examples: every output needs one row for each "
            "example, along the first dimension."
        )
    return torch.cat([x.reshape(n, -1) for x in floating], 1)

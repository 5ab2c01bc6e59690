"""A forward pass that leaves the model's buffers as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Forward passes inside work on copies of the model's buffers: what they write there is lost.

    >>> import torch
    >>> norm = nn.BatchNorm1d(2)
    >>> with kept_buffers(norm):
    ...     _ = norm(torch.randn(8, 2))
    >>> norm.num_batches_tracked
    tensor(0)
    """
    own = [(module, dict(module._buffers)) for module in model.modules()]
    copies: dict[int, Tensor] = {id(buffer): buffer.clone() for buffer in model.buffers()}
    for module, buffers in own:
        module._buffers.update({name: copies.get(id(buffer), buffer) for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in own:
            module._buffers.clear()
            module._buffers.update(buffers)


def without_updates(model: nn.Module, x: Tensor) -> Tensor:
    """``model(x)`` on copies of the model's buffers."""
    with kept_buffers(model):
        return model(x)

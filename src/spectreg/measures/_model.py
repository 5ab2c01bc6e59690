"""Reading a model without changing it: evaluation mode, batches on its device, everything put back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batches = Iterable[Any]  # of pairs (inputs, targets), as tuples or as the lists that a DataLoader gives


@contextmanager
def as_found(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside; afterwards every mode, buffer and the global generators are as they were.

    Sets the ``training`` flags themselves: ``train()`` has side effects in some models (merged adapters). A parameter
    that is not finite is refused by name; buffers may hold an infinite mask.

    >>> model = nn.BatchNorm1d(3)
    >>> with as_found(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"parameter {name!r} has entries that are NaN or infinite: there is nothing to measure.")
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = device_of(model)
    with torch.random.fork_rng(
        [] if device.type == "cpu" else [device], device_type="cuda" if device.type == "cpu" else device.type
    ):
        try:
            for module, _ in modes:
                module.training = False
            yield model
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):  # an unneeded write would invalidate graphs in flight
                        buffer.copy_(before)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def batches_on(device: torch.device, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches one by one on ``device``; an error names an empty loader or something that is no pair."""
    empty = True
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(f"batches gave {type(batch).__name__}: each batch must be a pair (inputs, targets).")
        x, y = batch
        if len(x):
            empty = False
            yield x.to(device), y.to(device)
    if empty:
        raise ValueError("batches is empty: there is no example to measure. A generator can be read only once.")

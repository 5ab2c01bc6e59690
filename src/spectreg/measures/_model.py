"""Reading a model without changing it: evaluation mode, batches on its device, everything put back."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectreg.measures._nested import mapped, tensors

Batches = Iterable[Any]


@contextmanager
def as_found(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside; afterwards every mode, buffer and the global generators are as they were.

    Sets the ``training`` flags themselves: ``train()`` has side effects in some models (merged adapters). Inference
    mode is left for the time inside, since nothing can be differentiated in it. A parameter without values, or one
    that is not finite, is refused by name; buffers may hold an infinite mask.

    >>> model = nn.BatchNorm1d(3)
    >>> with as_found(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    check_values(model)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = device_of(model)
    with (
        torch.inference_mode(False),
        torch.random.fork_rng(
            [] if device.type == "cpu" else [device], device_type="cuda" if device.type == "cpu" else device.type
        ),
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


def check_values(model: nn.Module) -> None:
    """Raise unless every parameter and buffer has values that can be differentiated by, and parameters finite ones."""
    check_there(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"{kind_of(model, name)} {name!r} was made in torch.inference_mode(), so nothing can be differentiated "
                "by it. Build or load the model outside of it."
            )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"parameter {name!r} has entries that are NaN or infinite: there is nothing to measure.")


def check_there(model: nn.Module) -> None:
    """Raise unless every parameter and buffer has values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{kind_of(model, name)} {name!r} is on the meta device and has no values: offloaded to disk or CPU by "
                "accelerate, or never loaded. Load the whole model onto one device (without device_map or with "
                "{'': 'cpu'})."
            )


def kind_of(model: nn.Module, name: str) -> str:
    return "parameter" if name in dict(model.named_parameters()) else "buffer"


def refuse_sharded(model: nn.Module) -> None:
    """Raise if a parameter is spread over devices, for a measure that needs whole ones."""
    if "torch.distributed.tensor" not in sys.modules:  # slow to import, and without it nothing is sharded
        return
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"parameter {name!r} is sharded (a DTensor), and this needs it whole. Load the full state dict "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) into a model "
                "on one device and measure that."
            )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def batches_on(device: torch.device, batches: Batches) -> Iterator[Any]:
    """The batches one by one on ``device``, without those that have no example; an error if none is left."""
    empty = True
    for batch in batches:
        if examples_in(batch):
            empty = False
            yield mapped(lambda x: moved(x, device), batch)
    if empty:
        raise ValueError("batches is empty: there is no example to measure. A generator can be read only once.")


def examples_in(batch: Any) -> int:
    """The length of the batch's first tensor that has one."""
    return next((len(x) for x in tensors(batch) if x.ndim), 1)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, as a tensor that can be differentiated where it was made in inference mode."""
    return x.to(device).clone() if x.is_inference() else x.to(device)

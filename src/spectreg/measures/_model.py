"""Reading a model without changing it: evaluation mode, batches on its device, everything put back."""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectreg.maps.behaviour import OF_EVERY_MODULE, put_back
from spectreg.measures._nested import mapped, tensors

Batches = Iterable[Any]


@contextmanager
def as_found(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside; afterwards modes, attributes, buffers and the global generators are as they were.

    Hooks on gradients are off for the time inside. Sets the ``training`` flags themselves: ``train()`` has side effects
    in some models (merged adapters). Inference mode is left, since nothing can be differentiated in it, and what makes
    two functions of one model, see `one_function`. A parameter without values, or one that is not finite, is refused by
    name; buffers may hold an infinite mask.

    >>> model = nn.BatchNorm1d(3)
    >>> with as_found(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}: give an nn.Module.")
    check_values(model)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    dictionaries = [d for m, _ in modes for d in (vars(m), m._buffers) if isinstance(d, dict)]
    entries: list[tuple[Any, Any]] = [(d, d.copy()) for d in dictionaries]
    held = [c for m, _ in modes for name, c in vars(m).items() if name not in OF_EVERY_MODULE]
    entries += [(c, c.copy()) for c in held if isinstance(c, dict | list)]
    hooked = [(p, p._backward_hooks) for p in model.parameters() if p._backward_hooks]
    unsaved = [(m._non_persistent_buffers_set, set(m._non_persistent_buffers_set)) for m, _ in modes]
    device = device_of(model)
    with (
        torch.inference_mode(False),
        one_function(),
        torch.random.fork_rng(
            [] if device.type == "cpu" else [device], device_type="cuda" if device.type == "cpu" else device.type
        ),
    ):
        try:
            for module, _ in modes:
                module.training = False
                module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
            for parameter, _ in hooked:
                parameter._backward_hooks = None
            yield model
        finally:
            for parameter, own_hooks in hooked:
                parameter._backward_hooks = own_hooks
            for module, training in modes:
                module.training = training
            for dictionary, own in entries:
                put_back(dictionary, own)
            for names, old in unsaved:
                names.intersection_update(old)
                names.update(old)
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):  # an unneeded write would invalidate graphs in flight
                        buffer.copy_(before)


@contextmanager
def one_function() -> Iterator[None]:
    """Plain kernels and the tensors' own precision.

    The encoder's fast path gives other values at padded places and runs without gradients only; fused attention has no
    second derivative; autocast would round the model's perturbations away.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with sdpa_kernel(SDPBackend.MATH), without_autocast():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast off on every kind of device."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


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
    """The length of the batch's longest tensor; some, such as boxes, may be empty where others are not."""
    return max((len(x) for x in tensors(batch) if x.ndim), default=1)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, as a tensor that can be differentiated where it was made in inference mode."""
    return x.to(device).clone() if x.is_inference() else x.to(device)

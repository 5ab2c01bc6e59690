"""The sizes of the inputs that the convolutions of a network meet."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectreg.weights.module_names import named_modules


def input_sizes(model: nn.Module, *example: Any, **keywords: Any) -> dict[str, tuple[int, ...]]:
    """The input size of every convolution of ``model`` in a forward pass of ``example``, by the name of its weight.

    The pass runs in evaluation mode without gradients; the mode is put back. A convolution used at several sizes is
    given the largest.

    >>> input_sizes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)), torch.zeros(1, 3, 32, 32))
    {'0.weight': (32, 32), '2.weight': (15, 15)}
    """
    sizes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            size = tuple(inputs[0].shape[-len(module.kernel_size) :])  # type: ignore[arg-type]
            sizes[name] = max(sizes.get(name, size), size)

        return hook

    convolutions = [(n, m) for n, m in named_modules(model) if isinstance(m, _ConvNd)]
    handles = [m.register_forward_pre_hook(note(f"{n}.weight".lstrip("."))) for n, m in convolutions]
    training = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(*example, **keywords)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return sizes

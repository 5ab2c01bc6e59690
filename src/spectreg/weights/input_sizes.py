"""The sizes of the inputs that the convolutions of a network meet."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectreg.maps.behaviour import undisturbed
from spectreg.weights.module_names import named_modules

Size = tuple[int, ...]


def input_sizes(model: nn.Module, *example: Any, **keywords: Any) -> dict[str, Size | tuple[Size, ...]]:
    """The input size of every convolution of ``model`` in a forward pass of ``example``, by the name of its weight.

    The pass runs in evaluation mode without gradients; the model is left as found. A convolution that meets inputs of
    several sizes is given all of them, in the order in which it meets them: choose one before ``map="operator"``. One
    that does not run, or whose weight is used by a function, is not in the result.

    >>> input_sizes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)), torch.zeros(1, 3, 32, 32))
    {'0.weight': (32, 32), '2.weight': (15, 15)}
    >>> shared = nn.Conv1d(1, 1, 3)
    >>> input_sizes(nn.Sequential(shared, shared), torch.zeros(1, 1, 9))
    {'0.weight': ((9,), (7,))}
    """
    met: dict[str, list[Size]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            x = inputs[0] if inputs else keywords["input"]
            size = tuple(x.shape[-len(module.kernel_size) :])  # type: ignore[arg-type]
            met.setdefault(name, [])
            if size not in met[name]:
                met[name].append(size)

        return hook

    names: dict[int, str] = {}  # of weights, a tied one by its first, as in `named_weights`
    handles = []
    for path, module in named_modules(model):
        if isinstance(module, _ConvNd):
            key = id(module._parameters.get("weight", module))
            name = names.setdefault(key, f"{path}.weight".lstrip("."))
            handles.append(module.register_forward_pre_hook(note(name), with_kwargs=True))
    try:
        with torch.no_grad(), undisturbed(model):
            model(*example, **keywords)
    except Exception as error:
        if missing := next((name for name, p in model.named_parameters() if p.is_meta), None):
            raise ValueError(
                f"parameter {missing!r} is on the meta device and has no values, and the forward pass fails: {error}. "
                "The sizes can be found without values: give the whole model and the example with .to('meta')."
            ) from error
        raise
    finally:
        for handle in handles:
            handle.remove()
    return {name: sizes[0] if len(sizes) == 1 else tuple(sizes) for name, sizes in met.items()}

"""The variety of models and of the weights in them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import jaxtyping
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Kind(NamedTuple):
    """A module with one interesting weight, and the dense matrices that weight stands for, written out by hand."""

    name: str
    build: Callable[[], nn.Module]
    weight: str
    matrices: Callable[[Tensor], list[Tensor]]
    each: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})

    def __repr__(self) -> str:
        return self.name


def rows(parts: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda W: [part.flatten(1) for part in W.chunk(parts)]


def transposed(groups: int) -> Callable[[Tensor], list[Tensor]]:
    """Outputs × (inputs, kernel) of each group, index by index."""

    def matrices(W: Tensor) -> list[Tensor]:
        return [torch.stack([part[:, o].flatten() for o in range(part.shape[1])]) for part in W.chunk(groups)]

    return matrices


class Bare(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(*shape))


def gpt2_projection() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(7, 4)
    nn.init.normal_(layer.weight)
    return layer


def channels_last() -> nn.Module:
    return nn.Conv2d(4, 6, (3, 2)).to(memory_format=torch.channels_last)


KINDS = [
    Kind("linear", lambda: nn.Linear(7, 5), "weight", rows(1)),
    Kind("one row", lambda: nn.Linear(7, 1), "weight", rows(1)),
    Kind("one column", lambda: nn.Linear(1, 5), "weight", rows(1)),
    Kind("bilinear", lambda: nn.Bilinear(3, 2, 5), "weight", rows(1)),
    Kind("conv1d", lambda: nn.Conv1d(4, 6, 3), "weight", rows(1)),
    Kind("conv2d", lambda: nn.Conv2d(4, 6, (3, 2)), "weight", rows(1)),
    Kind("conv2d channels last", channels_last, "weight", rows(1)),
    Kind("conv3d", lambda: nn.Conv3d(2, 3, (3, 2, 2)), "weight", rows(1)),
    Kind("grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", rows(2)),
    Kind("grouped channels last", lambda: nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last), "weight",
         rows(2)),
    Kind("grouped, each", lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", rows(2), True, {"map": "each"}),
    Kind("grouped, joint", lambda: nn.Conv2d(4, 6, 3, groups=2), "weight", rows(1), False, {"map": "joint"}),
    Kind("depthwise", lambda: nn.Conv2d(5, 5, 3, groups=5), "weight", rows(5)),
    Kind("transposed 1d", lambda: nn.ConvTranspose1d(4, 6, 3), "weight", transposed(1)),
    Kind("transposed 2d", lambda: nn.ConvTranspose2d(4, 6, (3, 2)), "weight", transposed(1)),
    Kind("transposed 3d", lambda: nn.ConvTranspose3d(2, 3, (3, 2, 2)), "weight", transposed(1)),
    Kind("transposed grouped", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", transposed(2)),
    Kind("transposed depthwise", lambda: nn.ConvTranspose2d(5, 5, 3, groups=5), "weight", transposed(5)),
    Kind("transposed channels last",
         lambda: nn.ConvTranspose2d(4, 6, (3, 2)).to(memory_format=torch.channels_last), "weight", transposed(1)),
    Kind("rnn", lambda: nn.RNN(3, 5), "weight_hh_l0", rows(1), True),
    Kind("lstm gates", lambda: nn.LSTM(3, 5), "weight_ih_l0", rows(4), True),
    Kind("lstm stack", lambda: nn.LSTM(3, 5), "weight_hh_l0", rows(1), False, {"map": "joint"}),
    Kind("lstm projection", lambda: nn.LSTM(3, 5, proj_size=2), "weight_hr_l0", rows(1)),
    Kind("gru cell", lambda: nn.GRUCell(3, 5), "weight_hh", rows(3), True),
    Kind("attention q, k, v", lambda: nn.MultiheadAttention(6, 2), "in_proj_weight", rows(3), True),
    Kind("attention heads", lambda: nn.MultiheadAttention(6, 2), "in_proj_weight", rows(6), True, {"map": "heads"}),
    Kind("attention of its own k", lambda: nn.MultiheadAttention(6, 2, kdim=4), "k_proj_weight", rows(1)),
    Kind("attention of its own k, heads", lambda: nn.MultiheadAttention(6, 2, kdim=4), "k_proj_weight", rows(2), True,
         {"map": "heads"}),
    Kind("gpt-2", gpt2_projection, "weight", lambda W: [W.T]),
    Kind("embedding", lambda: nn.Embedding(7, 3), "weight", rows(1), False, {"embeddings": True}),
    Kind("bare", lambda: Bare(3, 4), "table", rows(1)),
    Kind("bare kernel", lambda: Bare(3, 4, 2, 2), "table", rows(1)),
    Kind("bare, a stack", lambda: Bare(3, 5, 4), "table", list, True),
    Kind("bare, jointly", lambda: Bare(3, 2, 4), "table", rows(1), False, {"map": "joint"}),
    Kind("bare, a kernel with a first dimension of one", lambda: Bare(1, 3, 4, 2, 2), "table",
         lambda W: [W[0].flatten(1)], True),
    Kind("bare, a stack of one", lambda: Bare(1, 5, 4), "table", list, True, {"map": "each"}),
    Kind("bare, a stack of kernels", lambda: Bare(2, 3, 2, 2), "table", lambda W: [w.flatten(1) for w in W], True,
         {"map": "each"}),
]  # fmt: skip


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module in float64, its parameters drawn from an own generator.

    Their mean is one, so that the top singular value of every block stands clear of the second whatever the map.
    """
    module = build().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1 + torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def mlp(*, dtype: torch.dtype = torch.float64, seed: int = 0, widths: tuple[int, ...] = (5, 8, 6, 3)) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return seeded(lambda: nn.Sequential(*layers[:-1]), seed).to(dtype)


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)).double()


@contextmanager
def unchecked_types() -> Iterator[None]:
    """As users run it: without the checks of annotations that these tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)

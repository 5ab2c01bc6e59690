"""What a forward pass hands to attention: queries and keys, and the linear layers that made them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from spectreg.linalg.products import in_double
from spectreg.weights.module_names import named_modules
from spectreg.weights.reading import read_weight
from spectreg.weights.roles import is_stored_transposed

SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
PRODUCTS = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.einsum,
)


@dataclass(frozen=True)
class Projection:
    """A linear layer that has run: its name, weight (outputs × inputs), bias and inputs, one row a position.

    ``eps`` is the rounding of its outputs, under autocast too. ``module`` and ``attribute`` are where the weight is,
    ``columns`` whether as inputs × outputs.
    """

    name: str
    module: nn.Module
    attribute: str
    columns: bool
    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    eps: float

    def heads(self, width: int) -> tuple[Tensor, Tensor]:
        """Its outputs in float64 and the weight, both cut into heads of ``width``; a bias is the last column."""
        W = in_double(self.weight)
        b = W.new_zeros(len(W)) if self.bias is None else in_double(self.bias)
        y = in_double(self.inputs) @ W.T + b
        return y.unflatten(1, (-1, width)).transpose(0, 1), torch.cat([W, b[:, None]], 1).unflatten(0, (-1, width))


@dataclass(frozen=True)
class Attention:
    """One call of ``scaled_dot_product_attention``: where, its queries and keys, its scale, and what ran before it."""

    name: str
    query: Tensor
    key: Tensor
    scale: float
    before: list[Projection]


@dataclass
class Watch(TorchFunctionMode):
    """Notes every attention of the code that runs inside; refuses those whose queries and keys do not show."""

    ran: list[Projection] = field(default_factory=list)
    calls: list[Attention] = field(default_factory=list)
    running: list[tuple[str, nn.Module]] = field(default_factory=list)
    scores: dict[int, Tensor] = field(default_factory=dict)  # products of activations, and what is made of these
    weights: dict[int, Tensor] = field(default_factory=dict)  # made of parameters alone

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The function itself, after a look at what it is given."""
        keywords = dict(kwargs or {})
        if function is F.scaled_dot_product_attention:
            self.note(**dict(zip(("query", "key"), args, strict=False)), **keywords)
        elif function is F.multi_head_attention_forward:
            if not isinstance(self.running[-1][1], nn.MultiheadAttention):
                raise ValueError(f"{self.where} calls multi_head_attention_forward itself: use nn.MultiheadAttention.")
        elif function in SOFTMAX:
            x = args[0] if args else keywords.get("input")
            dim = args[1] if len(args) > 1 else keywords.get("dim")
            if isinstance(x, Tensor) and self.is_logits(x) and dim in (-1, x.ndim - 1):
                raise ValueError(
                    f"{self.where} takes a softmax of its own, whose queries and keys do not show: let it call "
                    "scaled_dot_product_attention (attn_implementation='sdpa' in transformers)."
                )
        result = function(*args, **keywords)
        if isinstance(result, Tensor):
            self.follow(function, [x for x in tree_leaves((args, keywords)) if isinstance(x, Tensor)], result)
        return result

    def follow(self, function: Any, given: list[Tensor], result: Tensor) -> None:
        """Note what is a product of activations, as the logits of attention are, until its shape changes."""
        if given and all(map(self.is_weight, given)):
            self.weights[id(result)] = result
            return
        is_product = function in PRODUCTS and not any(map(self.is_weight, given))
        if is_product or any(id(x) in self.scores and x.shape == result.shape for x in given):
            self.scores[id(result)] = result

    def is_weight(self, x: Tensor) -> bool:
        return isinstance(x, nn.Parameter) or id(x) in self.weights

    def is_logits(self, x: Tensor) -> bool:
        """Whether a softmax of ``x`` is that of attention: of four dimensions, or of three and a product."""
        return x.ndim == 4 or (x.ndim == 3 and id(x) in self.scores)

    @property
    def where(self) -> str:
        name, module = self.running[-1] if self.running else ("", nn.Module())
        return f"{name!r} ({type(module).__name__})"

    def note(self, query: Tensor, key: Tensor, scale: float | None = None, **others: Any) -> None:
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        self.calls.append(Attention(self.running[-1][0], query.detach(), key.detach(), scale, list(self.ran)))

    def enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.running.append((name, module))
            x = inputs[0] if inputs else keywords.get("input")
            if isinstance(x, Tensor) and (W := linear_weight(module)) is not None and x.shape[-1:] == W.shape[1:]:
                bias: Any = module.bias
                bias = None if bias is None else bias.detach()
                columns = not isinstance(module, nn.Linear)
                where = (name, module, "weight", columns)
                self.ran.append(Projection(*where, W, bias, x.detach().flatten(0, -2), rounding(W)))

        return hook

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()


def linear_weight(module: nn.Module) -> Tensor | None:
    """Outputs × inputs of a linear layer of torch or a ``Conv1D`` of transformers; None for anything else."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Linear):
        return read_weight(module, "weight").detach()
    return weight.detach().T if is_stored_transposed(module, "weight", tuple(weight.shape)) else None


def rounding(weight: Tensor) -> float:
    """The spacing of numbers near 1 in which products with ``weight`` are taken here."""
    kind = weight.device.type
    is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    cast = [torch.get_autocast_dtype(kind)] if is_cast and weight.dtype != torch.float64 else []
    return max(torch.finfo(dtype).eps for dtype in (weight.dtype, *cast))


@contextmanager
def attention_of(model: nn.Module) -> Iterator[list[Attention]]:
    """The calls of attention by the forward passes of ``model`` inside, in their order."""
    watch = Watch()
    handles = []
    for name, module in named_modules(model):
        handles.append(module.register_forward_pre_hook(watch.enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(watch.leave, always_call=True))
    try:
        with watch:
            yield watch.calls
    finally:
        for handle in handles:
            handle.remove()

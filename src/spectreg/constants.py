"""The Lipschitz constants of the operations that networks are built of, in the ℓ2 norm."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectreg.convolutions import ROUNDING, largest, norm_bound


class UnknownConstantError(ValueError):
    """Why an operation has no constant."""


@dataclass(frozen=True)
class Call:
    """One operation as it ran: its module if it is one, its arguments, its result, the first tensor argument."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    grid: int = 40

    @property
    def input(self) -> Tensor:
        return next(a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor))

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        """What a function was given under this name or at this position; a module's attribute."""
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


Constant = Callable[[Call], float]


def linear(call: Call) -> float:
    return largest(finite(call.module.weight)) * ROUNDING


def convolution(call: Call) -> float:
    return norm_bound(call.module, tuple(call.input.shape[2:]), grid=call.grid)


def batch_norm(call: Call) -> float:
    norm = call.module
    if norm.running_var is None:
        raise UnknownConstantError("it keeps no running statistics, so an example's output depends on its batch")
    scale = torch.rsqrt(finite(norm.running_var) + norm.eps)
    return (scale if norm.weight is None else finite(norm.weight) * scale).abs().max().item() * ROUNDING


def finite(weight: Tensor) -> Tensor:
    if not weight.isfinite().all():
        raise UnknownConstantError("a weight or statistic of it is NaN or infinite")
    return weight.detach().to("cpu", torch.float64)


def max_pool(call: Call) -> float:
    """√ of the number of windows that an input lies in, at most."""
    if not isinstance(call.output, Tensor):
        raise UnknownConstantError("it returns indices")
    sizes = call.output.shape[2:]
    k = per_dimension(call.argument("kernel_size", 1), sizes)
    s = per_dimension(call.argument("stride", 2) or k, sizes)
    p, d = (per_dimension(call.argument(*a), sizes) for a in (("padding", 3, 0), ("dilation", 4, 1)))
    overlaps = [
        F.conv_transpose1d(torch.ones(1, 1, n), torch.ones(1, 1, k[i]), stride=s[i], dilation=d[i])[
            ..., p[i] : p[i] + call.input.shape[2 + i]
        ].max()
        for i, n in enumerate(sizes)
    ]
    return math.sqrt(math.prod(o.item() for o in overlaps))


def average_pool(call: Call) -> float:
    """Exact: the product over dimensions of the norm of the pooling written as a matrix."""
    if call.argument("divisor_override", 6) is not None:
        raise UnknownConstantError("divisor_override is not covered")
    sizes = call.output.shape[2:]
    k = per_dimension(call.argument("kernel_size", 1), sizes)
    s = per_dimension(call.argument("stride", 2) or k, sizes)
    p = per_dimension(call.argument("padding", 3, 0), sizes)
    ceil, padded = call.argument("ceil_mode", 4, False), call.argument("count_include_pad", 5, True)
    return separable(call, lambda i, eye: F.avg_pool1d(eye, k[i], s[i], p[i], ceil, padded))


def adaptive_average_pool(call: Call) -> float:
    return separable(call, lambda i, eye: F.adaptive_avg_pool1d(eye, call.output.shape[2 + i]))


def separable(call: Call, pool: Callable[[int, Tensor], Tensor]) -> float:
    eyes = [torch.eye(n, dtype=torch.float64)[:, None] for n in call.input.shape[2:]]
    return math.prod(largest(pool(i, eye)[:, 0]) for i, eye in enumerate(eyes)) * ROUNDING


def per_dimension(value: Any, sizes: torch.Size) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value] * len(sizes)


def mean(call: Call) -> float:
    return math.sqrt(call.output.numel() / call.input.numel())


def total(call: Call) -> float:
    return math.sqrt(call.input.numel() / call.output.numel())


def dropout(call: Call) -> float:
    if call.module is None and call.argument("training", 2, True):
        raise UnknownConstantError("it is called with training=True; pass training=self.training")
    return 1.0


def slope(call: Call) -> float:
    return max(1.0, abs(call.argument("negative_slope", 1, 0.01)))


def prelu(call: Call) -> float:
    return max(1.0, finite(call.module.weight).abs().max().item())


def elu(call: Call) -> float:
    return max(1.0, abs(call.argument("alpha", 1, 1.0)))


def plain_index(call: Call) -> float:
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(isinstance(i, Tensor | list) for i in index):
        raise UnknownConstantError("an index by a tensor or list may repeat entries")
    return 1.0


def attribute(call: Call) -> float:
    if call.args[1] not in ("T", "mT", "H", "mH"):
        raise UnknownConstantError(f"no constant is known for the attribute {call.args[1]!r}")
    return 1.0


def view(call: Call) -> float:
    if call.output.dtype != call.input.dtype:
        raise UnknownConstantError("it reads the same bits as another type")
    return 1.0


ISOMETRIC = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, operator.neg, torch.neg,
    "flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "chunk", "split",
    "clone", "neg",
)  # fmt: skip
NON_EXPANSIVE = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Tanhshrink, nn.Softmax,
    nn.Softplus, F.relu, F.relu6, F.hardtanh, F.softsign, F.softplus, F.softmax, torch.relu, torch.tanh, torch.abs,
    torch.relu_, torch.softmax, "relu", "relu_", "tanh", "abs", "softmax",
)  # fmt: skip
CONSTANTS: dict[Any, float | Constant] = {
    **dict.fromkeys((*ISOMETRIC, *NON_EXPANSIVE), 1.0),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), 0.25),
    **dict.fromkeys((nn.GELU, F.gelu), 1.1290),  # at x = √2: Φ(x) + xφ(x) = 1.12890; the tanh form 1.12900
    **dict.fromkeys((nn.SiLU, F.silu), 1.0999),  # at x = 2.3994: 1.09984
    **dict.fromkeys((nn.Mish, F.mish), 1.0885),  # 1.08849
    **dict.fromkeys((nn.SELU, F.selu), 1.7581),  # scale · alpha = 1.75810
    **dict.fromkeys((nn.LeakyReLU, F.leaky_relu), slope),
    **dict.fromkeys((nn.ELU, F.elu), elu),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), dropout),
    **dict.fromkeys((F.dropout, F.dropout2d), dropout),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), batch_norm),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), convolution),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), max_pool),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), average_pool),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), average_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), adaptive_average_pool),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), adaptive_average_pool),
    **dict.fromkeys((torch.mean, "mean"), mean),
    **dict.fromkeys((torch.sum, "sum"), total),
    nn.Linear: linear,
    "view": view,
    getattr: attribute,
    nn.PReLU: prelu,
    operator.getitem: plain_index,
}


def concatenated(call: Call, bounds: Any) -> float:
    return bounds[0] if isinstance(bounds[0], float) else math.hypot(*bounds[0])  # the pieces of one value, or several


def added(call: Call, bounds: Any) -> float:
    """The sum, each bound times the norm of its broadcast and of a factor ``alpha``."""
    alpha = abs(call.kwargs.get("alpha", 1))
    first, second = (varying(call, bounds, i) for i in (0, 1))
    return first + alpha * second


def multiplied(call: Call, bounds: Any) -> float:
    first, second = (varying(call, bounds, i) for i in (0, 1))
    if first and second:
        raise UnknownConstantError("both factors depend on the input")
    return first * magnitude(call.args[1]) + second * magnitude(call.args[0])


def divided(call: Call, bounds: Any) -> float:
    if varying(call, bounds, 1):
        raise UnknownConstantError("the divisor depends on the input")
    return varying(call, bounds, 0) * magnitude(1 / call.args[1])


def varying(call: Call, bounds: Any, position: int) -> float:
    """The bound of an argument, times √ of how often broadcasting repeats it; 0 for a constant."""
    value = call.args[position]
    if not isinstance(value, Tensor):
        return 0.0
    return bounds[position] * math.sqrt(call.output.numel() / value.numel())


def magnitude(value: Any) -> float:
    return finite(value).abs().max().item() if isinstance(value, Tensor) else float(abs(value))


Combination = Callable[[Call, Any], float]
COMBINATIONS: dict[Any, Combination] = {
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate, torch.stack), concatenated),
    **dict.fromkeys((operator.add, torch.add, "add"), added),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), added),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), multiplied),
    **dict.fromkeys((operator.truediv, torch.div, "div"), divided),
}

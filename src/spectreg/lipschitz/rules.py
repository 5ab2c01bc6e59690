"""How much one operation of a network stretches the distance between two inputs, at most, in the ℓ2 norm."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectreg.lipschitz.convolution_bound import ROUNDING, largest, norm_bound


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


def live_norm(call: Call) -> float:
    """Of a normalization by the example's own statistics: largest where these vanish, ``max|γ|/√ε`` there.

    With n entries, mean square q of what is left after the mean is taken off, and s = q + ε, the Jacobian is
    ``(1 − zzᵀ/(n·s))/√s`` times projections, and ``zᵀz = n·q < n·s``: its norm is 1/√s at most.
    """
    norm = call.module
    if norm.eps is None or norm.eps <= 0:
        raise UnknownConstantError("without a positive eps it has no Lipschitz constant")
    scale = 1.0 if norm.weight is None else finite(norm.weight).abs().max().item()
    return scale / math.sqrt(norm.eps) * ROUNDING


def instance_norm(call: Call) -> float:
    return batch_norm(call) if call.module.running_var is not None else live_norm(call)


def attention(call: Call) -> float:
    raise UnknownConstantError("dot-product attention is not Lipschitz on all inputs (Kim et al., arXiv:2006.04710)")


def gated(call: Call) -> float:
    raise UnknownConstantError("a gate times an unbounded function of the input is not Lipschitz on all inputs")


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

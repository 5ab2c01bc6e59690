"""Rules for functions of each entry, and for those that compare or weigh the entries of a row."""

import math
from typing import Any

import torch
from torch import Tensor

from spectreg.lipschitz.calls import Call, Number, Operand, Rule, UnknownConstantError, finite

SMOOTH_FROM = {torch.float64: 37.0}  # softplus turns into x at its threshold, with a jump that rounding hides from here


def times(constant: float) -> Rule:
    """Of a function that takes nothing but its input: ``constant`` is its largest slope."""

    def rule(call: Call, input: Operand, inplace: bool = False) -> float:
        return constant * alone(input).bound

    return rule


def refused(reason: str) -> Rule:
    def rule(call: Call, *args: Operand | Any, **kwargs: Operand | Any) -> float:
        raise UnknownConstantError(reason)

    return rule


def leaky_relu(call: Call, input: Operand, negative_slope: Number = 0.01, inplace: bool = False) -> float:
    return max(1.0, abs(negative_slope)) * input.bound


def rrelu(
    call: Call,
    input: Operand,
    lower: Number = 1 / 8,
    upper: Number = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> float:
    if training:
        raise UnknownConstantError("it draws its slopes, called with training=True; pass training=self.training")
    return max(1.0, abs(lower + upper) / 2) * input.bound


def prelu(call: Call, input: Operand, weight: Tensor) -> float:
    return max(1.0, finite(weight).abs().max().item()) * input.bound


def elu(call: Call, input: Operand, alpha: Number = 1.0, inplace: bool = False) -> float:
    return max(1.0, abs(alpha)) * input.bound


def celu(call: Call, input: Operand, alpha: Number = 1.0, inplace: bool = False) -> float:
    if alpha < 0:
        raise UnknownConstantError("with a negative alpha it grows exponentially")
    return input.bound


def softplus(call: Call, input: Operand, beta: Number = 1.0, threshold: Number = 20.0) -> float:
    least = SMOOTH_FROM.get(call.output.dtype, 20.0)
    if threshold < least or beta == 0:
        raise UnknownConstantError(
            f"with beta={beta}, threshold={threshold} it jumps in {call.output.dtype}; use a threshold of {least:g} or "
            "more"
        )
    return input.bound


def softshrink(call: Call, input: Operand, lambd: Number = 0.5) -> float:
    return input.bound


def gelu(call: Call, input: Operand, approximate: str = "none") -> float:
    """At x = √2: Φ(x) + xφ(x) = 1.12890; the tanh form 1.12900."""
    return 1.1290 * input.bound


def threshold(call: Call, input: Operand, threshold: Number, value: Number, inplace: bool = False) -> float:
    if value != threshold:
        raise UnknownConstantError(f"it jumps at {threshold} to {value}")
    return input.bound


def hardtanh(call: Call, input: Operand, min_val: Number = -1.0, max_val: Number = 1.0, inplace: bool = False) -> float:
    return input.bound


def clamp(call: Call, input: Operand, min: Any = None, max: Any = None) -> float:
    return spread(call, input)


def dropout(call: Call, input: Operand, p: Number = 0.5, training: bool = True, inplace: bool = False) -> float:
    if training:
        raise UnknownConstantError("it is called with training=True; pass training=self.training")
    return input.bound


def alpha_dropout(call: Call, input: Operand, p: Number = 0.5, training: bool = False, inplace: bool = False) -> float:
    return dropout(call, input, p, training)


def softmax(call: Call, input: Operand, dim: int | None = None, _stacklevel: Any = 3, dtype: Any = None) -> float:
    """½: each row of ``diag(p) − ppᵀ`` sums in absolute value to 2p(1−p)."""
    return input.bound / 2


def log_softmax(call: Call, input: Operand, dim: int | None = None, _stacklevel: Any = 3, dtype: Any = None) -> float:
    """√n: ``‖1 − 1pᵀ‖`` is convex in p, and largest where p is a unit vector."""
    return math.sqrt(max(input.shape, default=1) if dim is None else length(input, dim)) * input.bound


def logsumexp(call: Call, input: Operand, dim: Any, keepdim: bool = False) -> float:
    return input.bound


def vector_norm(
    call: Call, input: Operand, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> float:
    if p not in (2, "fro", math.inf, None):
        raise UnknownConstantError(f"the norm of order {p} is not covered")
    return input.bound


def extreme(call: Call, input: Operand, dim: Any = (), keepdim: bool = False) -> float:
    """A largest or smallest entry moves no farther than the entry that moves most."""
    return input.bound


def extreme_or_pair(
    call: Call, input: Operand | Any, dim: Operand | Any = None, keepdim: bool = False, *, other: Operand | Any = None
) -> float:
    """``torch.max`` and ``min``: of all entries, along a dimension, or of two tensors."""
    second = dim if other is None else other
    return pair(call, input, second) if isinstance(second, Operand | Tensor) else extreme(call, input, dim, keepdim)


def pair(call: Call, input: Operand | Any, other: Operand | Any) -> float:
    """Each entry of the result moves no farther than that of one of the two."""
    return math.hypot(spread(call, input), spread(call, other))


def sort(call: Call, input: Operand, dim: int = -1, descending: bool = False, *, stable: Any = None) -> float:
    """Among all ways to pair off two rows, in order is the nearest."""
    return input.bound


def topk(call: Call, input: Operand, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> float:
    return input.bound


def where(call: Call, condition: Any, input: Operand | Any, other: Operand | Any) -> float:
    return pair(call, input, other)


def length(input: Operand, dim: int) -> int:
    return input.shape[dim] if input.tensor.ndim else 1


def spread(call: Call, value: Operand | Any) -> float:
    """The bound of an argument, times √ of how often broadcasting repeats it; 0 for a constant."""
    if not isinstance(value, Operand):
        return 0.0
    entries = value.tensor.numel()
    return value.bound * math.sqrt(call.output.numel() / entries)


def alone(input: Operand) -> Operand:
    """The operand, which must be a single tensor."""
    return Operand(input.tensor, input.bound)

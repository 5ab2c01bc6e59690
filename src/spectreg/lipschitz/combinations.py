"""Rules for sums, products and concatenations, and for what only copies entries or adds them up."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectreg.lipschitz.activations import spread
from spectreg.lipschitz.calls import Call, Number, Operand, UnknownConstantError, finite, tensors_of

FIELDS = ("values",)  # of the named tuples that max, sort and topk give


def added(call: Call, input: Operand | Any, other: Operand | Any, *, alpha: Number = 1) -> float:
    """The sum, each bound times the norm of its broadcast."""
    return spread(call, input) + abs(alpha) * spread(call, other)


def multiplied(call: Call, input: Operand | Any, other: Operand | Any) -> float:
    if isinstance(input, Operand) and isinstance(other, Operand):
        raise UnknownConstantError("both factors depend on the input")
    factor = magnitude(other if isinstance(input, Operand) else input)
    return (spread(call, input) + spread(call, other)) * factor


def divided(call: Call, input: Operand | Any, other: Operand | Any, *, rounding_mode: str | None = None) -> float:
    if isinstance(other, Operand):
        raise UnknownConstantError("the divisor depends on the input")
    if rounding_mode is not None:
        raise UnknownConstantError(f"with rounding_mode={rounding_mode!r} it jumps")
    if magnitude(other, smallest=True) == 0:
        raise UnknownConstantError("it divides by zero")
    return spread(call, input) / magnitude(other, smallest=True)


def magnitude(value: Any, smallest: bool = False) -> float:
    """The largest, or the smallest, size of an entry of a constant."""
    size = finite(torch.as_tensor(value)).abs()
    return (size.min() if smallest else size.max()).item()


def concatenated(call: Call, tensors: Operand | Sequence[Operand | Any], dim: int = 0) -> float:
    """The root of the sum of squares; the pieces of one value together are no more than that value."""
    values = [tensors] if isinstance(tensors, Operand) else [t for t in tensors if isinstance(t, Operand)]
    for tensor in tensors_of([v.value for v in values]):
        if not tensor.is_floating_point():
            raise UnknownConstantError(f"it joins values of {tensor.dtype} that depend on the input, which jump")
    return math.hypot(*[v.bound for v in values])


def copied(call: Call, input: Operand, *args: Any, **kwargs: Any) -> float:
    """Of an operation that gives entries of its input, and constants: √ of how often it gives the same one, exactly.

    Counted by the gradient of the sum of its results.
    """
    for tensor in tensors_of(call.output):
        if tensor.dtype != input.tensor.dtype:
            raise UnknownConstantError("it reads the same bits as another type")
    assert call.run is not None
    with torch.enable_grad():
        x = torch.zeros_like(input.tensor, dtype=torch.float64, device="cpu").requires_grad_()
        total = sum(part.sum() for part in tensors_of(call.run(x, *map(on_cpu, args), **kwargs)))
        (counts,) = torch.autograd.grad(total, x)  # type: ignore[arg-type]
    return math.sqrt(counts.max().item()) * input.bound


def on_cpu(index: Any) -> Any:
    """An index as it was, tensors in it on the CPU."""
    if isinstance(index, Tensor):
        return index.cpu()
    return type(index)(map(on_cpu, index)) if type(index) in (tuple, list) else index


def indexed(call: Call, input: Operand, index: Any) -> float:
    return copied(call, input, index) if isinstance(input.value, Tensor) else input.bound


def attribute(call: Call, input: Operand, name: str) -> float:
    plain = name in ("T", "mT", "H", "mH") if isinstance(input.value, Tensor) else name in FIELDS
    if not plain:
        raise UnknownConstantError(f"no constant is known for the attribute {name!r}")
    return input.bound


def cast(call: Call, input: Operand, *args: Any, **kwargs: Any) -> float:
    """To another floating point type, or place: rounding is left out of account, as it is everywhere."""
    return input.bound


def mean(call: Call, input: Operand, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> float:
    return math.sqrt(call.output.numel() / input.tensor.numel()) * input.bound


def total(call: Call, input: Operand, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> float:
    return math.sqrt(input.tensor.numel() / call.output.numel()) * input.bound


def cumulated(call: Call, input: Operand, dim: int, *, dtype: Any = None) -> float:
    """The norm of the triangular matrix of ones: 1/(2·sin(π/(4n+2)))."""
    n = input.shape[dim] if input.tensor.ndim else 1
    return input.bound / (2 * math.sin(math.pi / (4 * n + 2)))

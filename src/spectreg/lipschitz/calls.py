"""One operation of a network as it ran, and how a rule for its constant is applied to it."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

Number = int | float


class UnknownConstantError(ValueError):
    """Why an operation has no constant."""


@dataclass(frozen=True)
class Call:
    """One operation as it ran: its module if it is one, its arguments, its result; ``run`` runs it on others."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    grid: int = 40
    run: Callable[..., Any] | None = None

    @property
    def input(self) -> Tensor:
        """The first tensor among the arguments."""
        return next(a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor))


Constant = Callable[[Call], float]


@dataclass(frozen=True)
class Operand:
    """An argument that depends on the input, and the bound on how much: ``|change| ≤ bound·|change of the input|``."""

    value: Any
    bound: float

    @property
    def tensor(self) -> Tensor:
        if not isinstance(self.value, Tensor):
            raise UnknownConstantError(f"it is given a {type(self.value).__name__} of values that depend on the input")
        return self.value

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape


Rule = Callable[..., float]
"""Takes the call and then what the operation itself takes; gives the bound of the result.

What may depend on the input is annotated with ``Operand``; other arguments are constants, which the rule may not ignore
where they change it: it does not take those that it does not know.
"""


def bound_by(rule: Rule, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """The bound of the result of ``call``, whose arguments are ``args`` and ``kwargs`` with operands among them."""
    kwargs = {name: value for name, value in kwargs.items() if (name, value) != ("out", None)}
    try:
        given = inspect.signature(rule).bind(call, *args, **kwargs)
    except TypeError as error:
        raise UnknownConstantError(f"it is called with an argument that is not covered ({error})") from None
    for name, value in given.arguments.items():
        if has_operand(value) and not may_depend(rule, name):
            raise UnknownConstantError(f"its argument {name!r} depends on the input")
    try:
        return rule(*given.args, **given.kwargs)
    except (AttributeError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise UnknownConstantError(f"its arguments are not covered ({error})") from None


def has_operand(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(has_operand, value.values()))
    if isinstance(value, slice):
        return any(map(has_operand, (value.start, value.stop, value.step)))
    return isinstance(value, Operand) or (isinstance(value, tuple | list) and any(map(has_operand, value)))


def may_depend(rule: Rule, name: str) -> bool:
    """Whether the rule knows what to do where its argument ``name`` depends on the input."""
    return mentions_operand(inspect.signature(rule).parameters[name].annotation)


def mentions_operand(annotation: Any) -> bool:
    return annotation is Operand or any(map(mentions_operand, get_args(annotation)))


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in a result that may be one, or a tuple of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from tensors_of(part)


def finite(weight: Tensor) -> Tensor:
    """The weight in float64, on the CPU."""
    if weight.is_complex():
        raise UnknownConstantError("a weight of it is complex")
    if not weight.isfinite().all():
        raise UnknownConstantError("a weight or statistic of it is NaN or infinite")
    return weight.detach().to("cpu", torch.float64)

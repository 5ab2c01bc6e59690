"""The annotations of the library checked at every call that differs from those before it.

Whether a call keeps its annotations is decided by the types, shapes and dtypes of what goes in and comes out, and a
thousand power steps on one weight have but a few sets of these. What is known to pass is not checked again, since
jaxtyping takes longer over it than the step itself does.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import jaxtyping
import torch
from torch.nn.parameter import is_lazy

VALUES = (int, str, type(None), torch.dtype)  # of these the value counts, in a Literal or as a dimension
passed: set[Hashable] = set()
every_time = jaxtyping.jaxtyped


def sort(x: Any) -> Hashable:
    """All of x that an annotation can tell apart."""
    kind = type(x)
    if isinstance(x, torch.Tensor):
        return (kind, x.dtype) if is_lazy(x) else (kind, x.dtype, x.shape)
    if isinstance(x, VALUES):
        return kind, x
    if isinstance(x, tuple | list):
        return kind, *map(sort, x)
    if isinstance(x, dict):
        return kind, *((sort(key), sort(value)) for key, value in x.items())
    return kind


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """What jaxtyping's own decorator does, but once for calls that are alike."""

    def decorate(item: Any) -> Any:
        if not isinstance(item, FunctionType):
            return every_time(item, typechecker=typechecker)

        @functools.cache
        def checked() -> Any:
            return every_time(item, typechecker=typechecker)

        def check(result: Any, args: Any, kwargs: Any) -> None:
            """Of a call that has been made."""
            made = FunctionType((lambda *_, **__: result).__code__, item.__globals__, item.__name__, None,
                                (lambda: result).__closure__)  # fmt: skip
            made.__signature__ = inspect.signature(item)  # type: ignore[attr-defined]
            made.__qualname__, made.__module__ = item.__qualname__, item.__module__
            every_time(made, typechecker=typechecker)(*args, **kwargs)

        @functools.wraps(item)
        def call(*args: Any, **kwargs: Any) -> Any:
            if jaxtyping.config.jaxtyping_disable:
                return item(*args, **kwargs)
            given = item.__code__, sort(args), sort(kwargs)
            if given not in passed:
                result = checked()(*args, **kwargs)
                passed.update((given, (given, sort(result))))
                return result
            result = item(*args, **kwargs)
            if (given, sort(result)) not in passed:
                check(result, args, kwargs)
                passed.add((given, sort(result)))
            return result

        return call

    return decorate


@contextmanager
def once() -> Iterator[None]:
    """What jaxtyping's import hook decorates meanwhile is decorated so."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
    try:
        yield
    finally:
        jaxtyping.jaxtyped = every_time

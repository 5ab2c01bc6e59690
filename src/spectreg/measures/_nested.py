"""Tensors inside the structures that loaders and models give: tuples, lists, mappings, dataclasses."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor in ``tree``, in order.

    >>> import torch
    >>> [x.shape[0] for x in tensors({"a": torch.zeros(2), "b": (torch.zeros(3), "text")})]
    [2, 3]
    """
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [x for value in tree.values() for x in tensors(value)]
    if isinstance(tree, tuple | list):
        return [x for value in tree for x in tensors(value)]
    return [x for name in fields_of(tree) for x in tensors(getattr(tree, name))]


def fields_of(tree: Any) -> list[str]:
    """The names of what a dataclass holds."""
    if not is_dataclass(tree) or isinstance(tree, type):
        return []
    return [field.name for field in fields(tree) if hasattr(tree, field.name)]


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A copy of ``tree`` with ``function`` of every tensor in its place; what is no tensor is shared."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        changed = copy.copy(tree)
        for key, value in tree.items():
            changed[key] = mapped(function, value)  # type: ignore[index]
        return changed
    if isinstance(tree, tuple | list):
        return sequence_like(tree, [mapped(function, value) for value in tree])
    if names := fields_of(tree):
        changed = copy.copy(tree)
        for name in names:
            object.__setattr__(changed, name, mapped(function, getattr(tree, name)))  # it may be frozen
        return changed
    return tree


def copied(tree: Any) -> Any:
    """``tree`` with copies of its tensors, for a model to change as it likes; gradients go through."""
    return mapped(lambda x: x.clone(), tree)


def sequence_like(tree: Any, values: list[Any]) -> Any:
    """``values`` in a tuple, named tuple or list of the type of ``tree``."""
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def rows_of(tree: Any, start: int, stop: int, dim: int = 0) -> Any:
    """A copy of ``tree`` with some rows, along ``dim``, of every tensor that has any."""
    return mapped(lambda x: x.narrow(dim, start, stop - start) if x.ndim > dim else x, tree)


def with_tensors(tree: Any, replacements: Iterable[Tensor]) -> Any:
    """A copy of ``tree`` with ``replacements`` in the place of its tensors, in the order of ``tensors``."""
    following = iter(replacements)
    return mapped(lambda _: next(following), tree)

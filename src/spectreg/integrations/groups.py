"""Settings from the parameter groups of an optimizer."""

import re
import weakref
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from spectreg.optimizers import acting
from spectreg.regularizer import SpectralNormRegularizer
from spectreg.weights.selection import Weight, named_weights


def from_groups(model: nn.Module, *optimizers: Any, **settings: Any) -> SpectralNormRegularizer:
    """A regularizer of the weights whose groups have a ``"spectral_strength"``, attached to ``optimizers``.

    ``"num_heads"`` of a group cuts the outputs of its weights into so many equal parts. The strength is read before
    every step, so that a schedule may change it in the group.

    Args:
        settings: Of the regularizer, but for ``strength``, ``map`` and ``select``, which the groups say.

    Raises:
        ValueError: No group has a strength, or one that is no number from 0; and what ``attach`` raises.

    >>> import torch
    >>> layer = nn.Linear(4, 4)
    >>> groups = [{"params": [layer.weight], "spectral_strength": 0.01, "num_heads": 2}, {"params": [layer.bias]}]
    >>> from_groups(layer, torch.optim.SGD(groups, lr=0.1)).weights[0].map.blocks
    2
    """
    inner = [acting(optimizer) for optimizer in optimizers]
    found = named_weights(model, embeddings=True)
    _refuse_computed(inner, found)
    weights = {id(w.tensor): w.name for w in found}
    groups, known = _groups(inner, weights), _with_strength(inner)
    if not groups:
        raise ValueError(
            'no parameter group has a "spectral_strength" and a weight of the model: give {"params": …, '
            '"spectral_strength": 0.01} to the optimizer.'
        )
    heads = {_as_pattern(name): group["num_heads"] for name, group in groups.items() if "num_heads" in group}
    regularizer = SpectralNormRegularizer(
        model,
        _strengths(groups),
        map=heads or "matrix",
        select=lambda name, _: name in groups,
        **{"embeddings": True} | settings,
    )
    follows = weakref.ref(regularizer)

    def follow(*_: Any) -> None:
        regularizer = follows()
        if regularizer is None or regularizer._attachment is None:
            return
        if new := _with_strength(inner) - known:
            raise RuntimeError(
                f'{len(new)} parameters came to groups with a "spectral_strength" after from_groups(): detach() its '
                "regularizer, and call from_groups() again."
            )
        if regularizer.strength != (now := _strengths(_groups(inner, weights))):
            regularizer.strength = now

    for optimizer in inner:
        optimizer.register_step_pre_hook(follow)
    return regularizer.attach(*optimizers)


def _with_strength(optimizers: list[Optimizer]) -> set[int]:
    """The parameters, by id, of all groups that have a strength."""
    return {
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if "spectral_strength" in group
        for p in group["params"]
    }


def _refuse_computed(optimizers: list[Optimizer], weights: list[Weight]) -> None:
    """Refuse weights that are computed from parameters of a group with a strength."""
    held = _with_strength(optimizers)
    for w in weights:
        parts = w.module.parameters(recurse=False)
        if is_parametrized(w.module, w.attribute):
            parts = w.module.parametrizations[w.attribute].parameters()  # type: ignore[union-attr,index]
        if w.computed and any(id(p) in held for p in parts if p.ndim > 1):
            raise ValueError(
                f"weight {w.name!r} is under a parametrization: it is computed and has no gradient of its own, so that "
                'a group can give it no strength. Take its parts out of the groups with a "spectral_strength", and add '
                "the penalty() of a SpectralNormRegularizer of its own to the loss."
            )


def _groups(optimizers: list[Optimizer], weights: dict[int, str]) -> dict[str, dict[str, Any]]:
    """The group of each weight that has a strength in it, by its name."""
    return {
        weights[id(p)]: group
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in weights and "spectral_strength" in group
    }


def _strengths(groups: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {_as_pattern(name): group["spectral_strength"] for name, group in groups.items()}


def _as_pattern(name: str) -> str:
    """The pattern that matches ``name`` alone."""
    return re.sub(r"([*?[])", r"[\1]", name)

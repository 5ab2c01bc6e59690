"""The input of a batch, as what a loss is differentiated by."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from spectreg.measures._nested import sequence_like
from spectreg.measures._terms import scalar


def differentiable_input(x: Any) -> Tensor:
    """A leaf with the values of ``x`` to take gradients by; ``x`` itself never gets a ``.grad``."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"the inputs are a {type(x).__name__}: give a spectreg.BatchLoss(function, input=...) instead."
        )
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: only floating point inputs have a gradient. Use x.float().")
    return (x.clone() if x.is_inference() else x).detach().requires_grad_()


def perturbable(loss: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; an error at the first whose input cannot be differentiated by."""
    for batch in batches:
        differentiable_input(batch[loss.place(batch)])
        yield batch


def with_input(batch: Any, place: Any, x: Tensor) -> Any:
    """A copy of ``batch`` with ``x`` at ``place``."""
    if isinstance(batch, tuple):
        return sequence_like(batch, [x if i == place else value for i, value in enumerate(batch)])
    changed = copy.copy(batch)
    changed[place] = x
    return changed


def gradient_by_input(loss: Tensor, x: Tensor, retain_graph: bool = False) -> Tensor:
    """The gradient of a scalar ``loss`` by ``x`` and by nothing else; parameters get none."""
    loss = scalar(loss)
    g = None
    if loss.requires_grad:
        (g,) = torch.autograd.grad(loss, x, retain_graph=retain_graph, allow_unused=True)
    if g is None:
        raise ValueError("the loss does not depend on x in a differentiable way: look for detach() or argmax.")
    return g

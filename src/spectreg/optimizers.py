"""The tie between a regularizer and the optimizers before whose steps it acts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from spectreg.weights.selection import Weight

BeforeStep = Callable[[int, Mapping[int, Any], Tensor | float, Tensor | float], None]


class Attachment:
    """Hooks on optimizers; ``lanes`` says which of them holds each weight.

    Args:
        optimizers: May be wrapped by Fabric or Accelerate.
        weights: Those to regularize.
        before_step: Called with the number of the optimizer, the learning rate of each of its parameters by id, the
            factor by which its gradients are scaled, and 0 where the step is to be skipped.
    """

    def __init__(self, optimizers: Sequence[Any], weights: Sequence[Weight], before_step: BeforeStep) -> None:
        inner = [_unwrapped(optimizer) for optimizer in optimizers]
        for optimizer in inner:
            _refuse_line_search(optimizer)
        held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in inner]
        self.lanes = {w.name: i for w in weights for i, ids in enumerate(held) if id(w.tensor) in ids}
        _check_held(weights, self.lanes)
        self._handles = [
            optimizer.register_step_pre_hook(_hook(lane, before_step)) for lane, optimizer in enumerate(inner)
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _hook(lane: int, before_step: BeforeStep) -> Callable[..., Any]:
    def act(optimizer: Optimizer) -> None:
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        before_step(lane, rates, 1.0 if scale is None else scale, 1.0 if found is None else (found == 0).float())

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            act(optimizer)
            return None

        def closure_and_act() -> Any:
            loss = closure()
            with torch.no_grad():
                act(optimizer)
            return loss

        return (args[0],), {**kwargs, "closure": closure_and_act}

    return hook


def _unwrapped(optimizer: Any) -> Optimizer:
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"attach() takes optimizers of torch.optim, not {type(optimizer).__name__}.")
    return optimizer


def _refuse_line_search(optimizer: Optimizer) -> None:
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS evaluates loss and gradient several times a step and compares the losses, so the penalty has to be "
            "part of the loss: add penalty() to it inside the closure."
        )


def _check_held(weights: Sequence[Weight], lanes: Mapping[str, int]) -> None:
    left = [w.name for w in weights if w.name not in lanes and w.tensor.requires_grad]
    if left:
        raise ValueError(
            f"the optimizer does not hold {', '.join(left[:8])}{' …' if len(left) > 8 else ''}. Attach the optimizer "
            "of this model (all of them if there are several), or leave these weights out with select."
        )

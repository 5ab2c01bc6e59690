"""Measure: the gradient of the loss by the input (Figures 2 and 6 of arXiv:1705.10941)."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from spectreg.linalg.directions import lengths
from spectreg.measures._losses import LossFunction, differentiable_input, example_losses, gradient_by_input
from spectreg.measures._model import Batches, as_found, batches_on, device_of


@dataclass(frozen=True)
class InputGradientNorm:
    """The mean of ‖∇ₓL‖₂ over examples, in units of the loss per unit of the input."""

    value: float
    standard_error: float
    examples: int


def input_gradient_norm(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> InputGradientNorm:
    """The mean over examples of ``‖∇ₓ L(f(x), y)‖₂``, in evaluation mode.

    Exact; L is the loss of one example, whether ``loss_fn`` takes the mean or the sum of a batch. Does not depend on
    how the examples are split into batches. The model is left as found.

    Args:
        loss_fn: Called as ``loss_fn(output[None], target[None])`` under ``torch.vmap``; a scalar.
        batches: Pairs (inputs, targets), read once; moved to the model's device.

    Raises:
        ValueError: No example; a loss that is not a scalar or does not depend on the input.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> batch = (torch.zeros(4, 2), torch.zeros(4, 1))
    >>> input_gradient_norm(model, lambda output, y: (output - y).sum(), [batch])
    InputGradientNorm(value=1.41421..., standard_error=0.0, examples=4)
    """
    norms = []
    with as_found(model), torch.enable_grad():
        for batch, y in batches_on(device_of(model), batches):
            x = differentiable_input(batch)
            loss = example_losses(loss_fn, model(x), y).sum()
            norms.append(lengths(gradient_by_input(loss, x)).double())
    values = torch.cat(norms)
    n = len(values)
    spread = values.std().item() if n > 1 else math.nan
    return InputGradientNorm(values.mean().item(), spread / math.sqrt(n), n)

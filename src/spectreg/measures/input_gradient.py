"""Measure: the gradient of the loss by the input (Figures 2 and 6 of arXiv:1705.10941)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectreg.linalg.directions import lengths
from spectreg.measures._examples import (
    are_rows,
    checked_dimension,
    example_weights,
    may_be_one_step,
    refuse_one_step,
)
from spectreg.measures._forms import PairLoss, WholeLoss, loss_of
from spectreg.measures._inputs import differentiable_input, gradient_by_input, perturbable, with_input
from spectreg.measures._model import Batches, as_found, batches_on, device_of
from spectreg.measures._outputs import output_of
from spectreg.measures._terms import LossFunction
from spectreg.measures.losses import BatchLoss


@dataclass(frozen=True)
class InputGradientNorm:
    """The mean of ‖∇ₓL‖₂ over the examples that count in the loss, in units of the loss per unit of the input."""

    value: float
    standard_error: float
    examples: int


def input_gradient_norm(model: nn.Module, loss_fn: LossFunction | BatchLoss, batches: Batches) -> InputGradientNorm:
    """The mean over examples of ``‖∇ₓ L(f(x), y)‖₂``, in evaluation mode.

    Exact: the sum over examples of ‖∂L/∂xᵢ‖₂, L the mean loss of all examples as one batch, so that class weights,
    ignored targets and the number of terms count as they do there. A sum is divided by the number of targets. Does not
    depend on how the examples are split into batches. The model is left as found.

    Args:
        loss_fn: Called as ``loss_fn(model(x), y)``; a scalar, the mean or the sum of terms. Or a `BatchLoss`.
        batches: Pairs (inputs, targets), read once; moved to the model's device. Examples lie along the first
            dimension of the inputs, or along the second where outputs depend on several places of the first (time).

    Raises:
        ValueError: No example; a loss that is not a scalar, does not depend on the input, or is neither a mean nor a
            sum; outputs that depend on other examples of the batch.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> batch = (torch.zeros(4, 2), torch.zeros(4, 1))
    >>> input_gradient_norm(model, lambda output, y: (output - y).sum(), [batch])
    InputGradientNorm(value=1.41421..., standard_error=0.0, examples=4)
    """
    loss = loss_of(loss_fn)
    rows, terms, dimension, unclear, several = [], 0.0, None, None, False
    with as_found(model), torch.enable_grad():
        for batch in loss.begin(model, perturbable(loss, batches_on(device_of(model), batches))):
            place = loss.place(batch)
            x = differentiable_input(batch[place])
            with output_of(model) as outputs:
                value = loss(model, with_input(batch, place, x))
            if not value.factor:
                continue
            if dimension is None and may_be_one_step(x, outputs.last):
                unclear = x.shape
            elif dimension is None or (not several and x.shape[dimension] > 1):  # one example does not tell of others
                found = checked_dimension(x, outputs.last)
                several = x.shape[found] > 1
                if dimension not in (None, found):
                    raise ValueError(
                        f"a batch of shape {tuple(x.shape)} has its examples along another dimension than those before "
                        "it: give batches with more than one example."
                    )
                dimension = found
            g = gradient_by_input(value.loss, x).movedim(dimension or 0, 0)
            norms = value.factor * lengths(g).double().cpu()
            rows.append(torch.stack([norms, counted(loss, value.count, outputs.last, batch, len(norms))]))
            terms += value.count
    if not rows:
        raise ValueError("no target counts in the loss: there is nothing to average.")
    if unclear is not None and dimension != 0:
        refuse_one_step(unclear)
    norms, weights = torch.cat(rows, 1)
    return mean_of(norms, weights, terms)


def counted(loss: PairLoss | WholeLoss, terms: float, output: Any, batch: Any, n: int) -> Tensor:
    """How many of a batch's terms belong to each of its ``n`` examples; alike where the loss does not tell."""
    if terms and isinstance(loss, PairLoss) and are_rows(n, output, batch[1]):
        is_mean = loss.known_terms.is_mean
        return example_weights(loss.of, output, batch[1], is_mean) * (terms if is_mean else terms / n)
    return torch.full((n,), terms / n, dtype=torch.float64, device="cpu")


def mean_of(norms: Tensor, weights: Tensor, terms: float) -> InputGradientNorm:
    """Σ norms / terms, with the standard error of a weighted mean."""
    n = int((weights > 0).sum())
    value = (norms.sum() / terms).item()
    squares = (norms - weights * value).square().sum().item() * n / (n - 1) if n > 1 else math.nan
    return InputGradientNorm(value, math.sqrt(squares) / terms, n)

"""Adversarial training with the single ℓ2 step of Eq. (3)."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectreg.baselines.buffers import kept_buffers
from spectreg.linalg.directions import unit
from spectreg.measures._examples import example_dimension, may_be_one_step, refuse_one_step
from spectreg.measures._forms import PairLoss, WholeLoss, call, loss_of
from spectreg.measures._inputs import differentiable_input, gradient_by_input, with_input
from spectreg.measures._model import check_there
from spectreg.measures._nested import tensors
from spectreg.measures._outputs import output_of
from spectreg.measures._terms import LossFunction, scalar
from spectreg.measures.losses import BatchLoss


def adversarial_loss(
    model: nn.Module,
    loss_fn: LossFunction | BatchLoss,
    x: Any,
    y: Any = None,
    epsilon: float = 1.0,
    alpha: float = 0.5,
) -> Float[Tensor, ""]:
    """The loss of adversarial training: ``α L(f(x)) + (1 − α) L(f(x + η))``, Eq. (3) of arXiv:1705.10941.

    ``η = ε g/‖g‖₂`` with ``g`` the gradient of the loss by the input, for each example. η is a constant for the
    backward pass, and 0 where g is 0. Beyond two forwards it costs one backward to the input alone.

    The unperturbed forward is an ordinary training step. The perturbed one works on copies of the model's buffers, so
    that running statistics describe the data evaluation will see and advance once a step. In training mode batch
    normalization makes g of an example depend on its batch; dropout draws a new mask for each forward.

    Args:
        loss_fn: Called as ``loss_fn(model(x), y)``; a scalar. Or a `BatchLoss`, with the whole batch as ``x``.
        x: A batch of inputs. Not modified; nothing is ever left in ``x.grad``. Examples lie along its first dimension,
            or along the second where outputs depend on several places of the first (time).
        epsilon: The ℓ2 length of η, in the units of ``x`` (the paper: 1).
        alpha: The share of the unperturbed loss, from 0 to 1 (the paper: 0.5).

    Returns:
        The loss; its ``backward()`` reaches the model's parameters and nothing else.

    Raises:
        ValueError: The loss is not a scalar or does not depend on ``x``; a setting is out of range; a parameter has no
            values (meta device).

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> zero = torch.zeros(1, 2)
    >>> loss = adversarial_loss(layer, lambda output, y: output.mean(), zero, zero)
    >>> round(loss.item(), 4)  # ½·0 + ½·‖(1, 1)‖₂
    0.7071
    """
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}: a perturbation needs a finite length of 0 or more.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: the share of the unperturbed loss lies between 0 and 1.")
    check_there(model)
    loss = loss_of(loss_fn)
    batch = x if isinstance(loss, WholeLoss) else (x, y)
    place = loss.place(batch)
    with torch.enable_grad():
        clean = differentiable_input(batch[place])
        with output_of(model) as outputs:
            clean_loss = batch_loss(model, loss, with_input(batch, place, clean))
        d = dimension(clean, outputs.last)
        g = gradient_by_input(clean_loss, clean, retain_graph=True)
        eta = epsilon * unit(g.movedim(d, 0)).movedim(0, d)
        with kept_buffers(model):
            perturbed_loss = batch_loss(model, loss, with_input(batch, place, clean.detach() + eta))
    return alpha * clean_loss + (1 - alpha) * perturbed_loss


def batch_loss(model: nn.Module, loss: PairLoss | WholeLoss, batch: Any) -> Tensor:
    """The loss as the function gives it, whatever it is the mean or the sum of."""
    if isinstance(loss, PairLoss):
        return loss.of(call(model, batch[0]), batch[1])
    result = loss.given.function(model, batch)
    return scalar(result[0] if isinstance(result, tuple) else result)


def dimension(x: Tensor, output: Any) -> int:
    """Where the examples lie; asks the graph, at the price of backwards, only where the shapes leave it open."""
    y = next((t for t in tensors(output) if t.ndim), None)
    if y is None:
        return 0
    told = len(y) == len(x) and x.shape[0] not in x.shape[1:2] and y.shape[1:2] != x.shape[1:2]
    if told and x.ndim in (2, 4):
        return 0
    if may_be_one_step(x, output):
        refuse_one_step(x.shape)
    return example_dimension(x, output) or 0

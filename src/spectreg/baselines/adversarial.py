"""Adversarial training with the single ℓ2 step of Eq. (3)."""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from spectreg.baselines.buffers import without_updates
from spectreg.linalg.directions import unit
from spectreg.measures._losses import LossFunction, differentiable_input, gradient_by_input


def adversarial_loss(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Shaped[Tensor, "batch ..."],
    y: Tensor,
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
        loss_fn: Called as ``loss_fn(model(x), y)``; a scalar, the mean or the sum over the batch.
        x: A batch of inputs. Not modified; nothing is ever left in ``x.grad``.
        epsilon: The ℓ2 length of η, in the units of ``x`` (the paper: 1).
        alpha: The share of the unperturbed loss, from 0 to 1 (the paper: 0.5).

    Returns:
        The loss; its ``backward()`` reaches the model's parameters and nothing else.

    Raises:
        ValueError: The loss is not a scalar or does not depend on ``x``; a setting is out of range.

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
    with torch.enable_grad():
        clean = differentiable_input(x)
        clean_loss = loss_fn(model(clean), y)
        eta = epsilon * unit(gradient_by_input(clean_loss, clean, retain_graph=True))
        perturbed_loss = loss_fn(without_updates(model, x.detach() + eta), y)
    return alpha * clean_loss + (1 - alpha) * perturbed_loss

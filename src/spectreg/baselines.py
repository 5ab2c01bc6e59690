"""What the paper compares with: adversarial training and the Jacobian penalties."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call

LossFunction = Callable[[Tensor, Tensor], Tensor]


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
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: only floating point inputs have a gradient. Use x.float().")
    with torch.enable_grad():
        clean = x.detach().requires_grad_()
        clean_loss = loss_fn(model(clean), y)
        eta = epsilon * unit_gradient(clean_loss, clean)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        perturbed_loss = loss_fn(functional_call(model, buffers, (x.detach() + eta,)), y)
    return alpha * clean_loss + (1 - alpha) * perturbed_loss


def unit_gradient(loss: Tensor, x: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
    """The gradient of ``loss`` by each example of ``x``, divided by its ℓ2 norm; zero where it is zero.

    The graph of ``loss`` stays usable.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}: it must be a scalar. Use reduction='mean'.")
    (g,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True) if loss.requires_grad else (None,)
    if g is None:
        raise ValueError("the loss does not depend on x in a differentiable way: check for detach() or argmax.")
    # Gradients of confident examples are so small that their squares vanish: scale by the largest entry first.
    dims = tuple(range(1, g.ndim))
    g = g / g.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    return g / torch.linalg.vector_norm(g, dim=dims, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)

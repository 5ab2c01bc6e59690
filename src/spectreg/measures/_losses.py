"""The loss of each example, and its gradient by the input."""

from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor

LossFunction = Callable[[Tensor, Tensor], Tensor]


def scalar(loss: Tensor) -> Tensor:
    """The loss as it came; an error unless it is one number."""
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}: it must be a scalar. Use reduction='mean'.")
    return loss.reshape(())


def example_losses(loss_fn: LossFunction, output: Shaped[Tensor, "batch ..."], y: Tensor) -> Shaped[Tensor, " batch"]:
    """The loss of each example by itself, whether ``loss_fn`` takes the mean or the sum of its batch.

    >>> example_losses(torch.nn.functional.mse_loss, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))
    tensor([1., 4.])
    """
    return torch.vmap(lambda o, t: scalar(loss_fn(o[None], t[None])), randomness="different")(output, y)


def differentiable_input(x: Tensor) -> Tensor:
    """A leaf with the values of ``x`` to take gradients by; ``x`` itself never gets a ``.grad``."""
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: only floating point inputs have a gradient. Use x.float().")
    return x.detach().requires_grad_()


def gradient_by_input(loss: Tensor, x: Tensor, retain_graph: bool = False) -> Tensor:
    """The gradient of a scalar ``loss`` by ``x`` and by nothing else; parameters get none."""
    loss = scalar(loss)
    g = None
    if loss.requires_grad:
        (g,) = torch.autograd.grad(loss, x, retain_graph=retain_graph, allow_unused=True)
    if g is None:
        raise ValueError("the loss does not depend on x in a differentiable way: look for detach() or argmax.")
    return g

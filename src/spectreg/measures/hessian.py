"""Measure: the largest eigenvalues of the loss Hessian (Figure 3 of arXiv:1705.10941)."""

from collections.abc import Iterator, Sized

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectreg.linalg.directions import gaussian_like, own_generator
from spectreg.linalg.lanczos import Eigenvalues, Goal, Operator, lanczos
from spectreg.linalg.shifted_power import shifted_power
from spectreg.measures._losses import LossFunction, example_losses
from spectreg.measures._model import Batches, as_found, batches_on, device_of


def hessian_top_eigenvalues(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    k: int = 1,
    *,
    tolerance: float = 1e-3,
    max_products: int = 500,
    method: str = "lanczos",
    generator: torch.Generator | None = None,
) -> Eigenvalues:
    """The ``k`` largest algebraic eigenvalues of the Hessian of the mean loss by the parameters.

    The mean is over all examples of all batches, in evaluation mode; the parameters are those with ``requires_grad``.
    One batch is in memory at a time (a single batch keeps its graph between products). The model is left as found.

    Args:
        loss_fn: Called as ``loss_fn(output[None], target[None])`` under ``torch.vmap``; a scalar.
        batches: Pairs (inputs, targets), read once a product: a list or a loader that gives the same examples again.
        tolerance: Each residual ‖Hv − θv‖₂ is to be at most this share of |θ|.
        max_products: Passes over the batches at most.
        method: ``"lanczos"``, or ``"power"``, the paper's iteration, shifted where the dominant eigenvalue is negative.
        generator: Draws the first vector; by default a private one with seed 0.

    Returns:
        Values in units of the loss, residuals, products and a flag.

    Raises:
        ValueError: No example, k out of range, a loss that does not depend on the parameters, a non-finite product.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> batch = (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
    >>> hessian_top_eigenvalues(model, nn.functional.mse_loss, [batch]).values  # 2·(1 + 9)/2
    (10.0,)
    """
    solvers = {"lanczos": lanczos, "power": shifted_power}
    if method not in solvers:
        raise ValueError(f"method is {method!r}: it must be 'lanczos' or 'power'.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in parameters)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}: the model has {n} parameters with requires_grad, so k must lie in 1 … {n}.")
    if not 0 < tolerance < 1 or max_products < 1:
        raise ValueError(
            f"tolerance is {tolerance}, max_products {max_products}: use 0 < tolerance < 1 and at least 1."
        )
    like = torch.cat([p.detach().flatten()[:0] for p in parameters])
    like = like.new_zeros(n, dtype=torch.promote_types(like.dtype, torch.float32))
    # The fused attention kernels have no second derivative.
    with as_found(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        product = hessian_product(model, loss_fn, batches, parameters)
        generator = own_generator(generator)
        return solvers[method](product, gaussian_like(like, generator), Goal(k, tolerance, max_products), generator)


def hessian_product(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, parameters: list[nn.Parameter]
) -> Operator:
    """``v ↦ Hv`` for the Hessian of the mean loss over all examples; v and Hv are flat."""
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches can be read only once, the Hessian needs several passes. Give a list or a DataLoader."
        )
    kept = list(batch_gradients(model, loss_fn, batches, parameters)) if is_single(batches) else None
    sizes = [p.numel() for p in parameters]

    def product(v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        direction = [part.view_as(p).to(p.dtype) for part, p in zip(v.split(sizes), parameters, strict=True)]
        total, examples = torch.zeros_like(v), 0
        for gradients, count in batch_gradients(model, loss_fn, batches, parameters) if kept is None else kept:
            total += product_with(gradients, parameters, direction, retain_graph=kept is not None).to(v)
            examples += count
        return total / examples

    return product


def is_single(batches: Batches) -> bool:
    return isinstance(batches, Sized) and len(batches) == 1


def batch_gradients(
    model: nn.Module, loss_fn: LossFunction, batches: Batches, parameters: list[nn.Parameter]
) -> Iterator[tuple[tuple[Tensor | None, ...], int]]:
    """For each batch the gradient of the summed loss, with its graph, and the number of examples."""
    for x, y in batches_on(device_of(model), batches):
        loss = example_losses(loss_fn, model(x), y).sum()
        gradients: tuple[Tensor | None, ...] = (None,)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        if all(g is None for g in gradients):
            raise ValueError("the loss does not depend on the parameters in a differentiable way: look for detach().")
        yield gradients, len(x)


def product_with(
    gradients: tuple[Tensor | None, ...], parameters: list[nn.Parameter], direction: list[Tensor], retain_graph: bool
) -> Float[Tensor, " n"]:
    """The Hessian times ``direction``, flat: the derivative of the gradient's product with it."""
    pairs = [(g, d) for g, d in zip(gradients, direction, strict=True) if g is not None and g.requires_grad]
    rows: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if pairs:  # a loss linear in the parameters has none
        outputs, along = zip(*pairs, strict=True)
        rows = torch.autograd.grad(outputs, parameters, along, retain_graph=retain_graph, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if row is None else row.detach().flatten()
            for row, p in zip(rows, parameters, strict=True)
        ]
    )

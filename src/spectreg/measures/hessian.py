"""Measure: the largest eigenvalues of the loss Hessian (Figure 3 of arXiv:1705.10941)."""

import copy
import math
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from spectreg.linalg.directions import gaussian_like, length, own_generator
from spectreg.linalg.lanczos import Eigenvalues, Goal, Operator, lanczos
from spectreg.measures._forms import PairLoss, WholeLoss, loss_of
from spectreg.measures._model import Batches, as_found, batches_on, check_there, device_of, refuse_sharded
from spectreg.measures._nested import mapped
from spectreg.measures._terms import LossFunction
from spectreg.measures.losses import BatchLoss

ROUNDED = 0.05  # asymmetry by rounding above which the largest eigenvalue was off by 40 % to 100 ×; 1 % at 0.03


def hessian_top_eigenvalues(
    model: nn.Module,
    loss_fn: LossFunction | BatchLoss,
    batches: Batches,
    k: int = 1,
    *,
    tolerance: float = 1e-3,
    max_products: int = 500,
    generator: torch.Generator | None = None,
) -> Eigenvalues:
    """The ``k`` largest algebraic eigenvalues of the Hessian of the mean loss by the parameters.

    The loss is the one that ``loss_fn`` would give for all examples as one batch: class weights, ignored targets and
    the number of terms in each batch count as they do there. A sum is divided by the number of targets. Evaluation
    mode; the parameters are those with ``requires_grad``. One batch is in memory at a time (a single batch keeps its
    graph between products). The model is left as found.

    Args:
        loss_fn: Called as ``loss_fn(model(x), y)``; a scalar, the mean or the sum of terms. Or a `BatchLoss`.
        batches: Pairs (inputs, targets), read once a product: a list or a loader that gives the same examples again.
        tolerance: Each residual ‖Hv − θv‖₂ is to be at most this share of |θ|.
        max_products: Passes over the batches at most.
        generator: Draws the first vector; by default a private one with seed 0.

    Returns:
        Values in units of the loss, residuals, products and a flag.

    Raises:
        ValueError: No example, k out of range, a loss that does not depend on the parameters or is neither a mean nor
            a sum, a second derivative that is not symmetric, sharded parameters, a non-finite product.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> batch = (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
    >>> hessian_top_eigenvalues(model, nn.functional.mse_loss, [batch]).values  # 2·(1 + 9)/2
    (10.0,)
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in parameters)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}: the model has {n} parameters with requires_grad, so k must lie in 1 … {n}.")
    if not 0 < tolerance < 1 or max_products < 1:
        raise ValueError(
            f"tolerance is {tolerance}, max_products {max_products}: use 0 < tolerance < 1 and at least 1."
        )
    refuse_sharded(model)
    check_there(model)
    like = torch.cat([p.detach().flatten()[:0] for p in parameters])
    like = like.new_zeros(n, dtype=torch.promote_types(like.dtype, torch.float32))
    with as_found(model), torch.enable_grad():
        generator = own_generator(generator)
        start = gaussian_like(like, generator)
        product = hessian_product(model, loss_fn, batches, parameters)
        return lanczos(product, start, Goal(k, tolerance, max_products), generator)


def hessian_product(
    model: nn.Module, loss_fn: LossFunction | BatchLoss, batches: Batches, parameters: list[nn.Parameter]
) -> Operator:
    """``v ↦ Hv`` for the Hessian of the mean loss over all examples; v and Hv are flat."""
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches can be read only once, the Hessian needs several passes. Give a list or a DataLoader."
        )
    loss = loss_of(loss_fn)
    with second_derivatives():
        first = next(batch_gradients(model, loss, batches, parameters), None)
    if first is None:
        raise ValueError("no target counts in the loss: it has no Hessian.")
    with second_derivatives():
        refuse_asymmetric(model, loss_fn, batches, first, parameters)
    kept = [first] if is_single(batches) else None
    del first

    def product(v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        total, terms = torch.zeros_like(v), 0.0
        for batch in kept or batch_gradients(model, loss, batches, parameters):
            total += batch.factor * product_with(batch.gradients, parameters, v, retain_graph=kept is not None)
            terms += batch.count
        return total / terms if terms else total

    return product


def is_single(batches: Batches) -> bool:
    """Whether there is only one batch; not known of a loader that has no length."""
    try:
        return isinstance(batches, Sized) and len(batches) == 1
    except TypeError:  # a DataLoader of an iterable dataset
        return False


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Names what torch says where an operation has a first derivative only."""
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" not in str(error) and "once_differentiable" not in str(error):
            raise
        raise ValueError(f"an operation has no second derivative, so there is no Hessian: {error}") from error


@dataclass(frozen=True)
class BatchGradient:
    """The gradient of a batch's loss, with its graph, and what the batch weighs."""

    gradients: tuple[Tensor | None, ...]
    factor: float
    count: float


def batch_gradients(
    model: nn.Module, loss: PairLoss | WholeLoss, batches: Batches, parameters: list[nn.Parameter]
) -> Iterator[BatchGradient]:
    """One batch after the other; those in which no term counts are left out."""
    for batch in loss.begin(model, batches_on(device_of(model), batches)):
        value = loss(model, batch)
        if not value.factor:
            continue
        gradients: tuple[Tensor | None, ...] = (None,)
        if value.loss.requires_grad:
            gradients = torch.autograd.grad(value.loss, parameters, create_graph=True, allow_unused=True)
        if all(g is None for g in gradients):
            raise ValueError("the loss does not depend on the parameters in a differentiable way: look for detach().")
        yield BatchGradient(gradients, value.factor, value.count)


def product_with(
    gradients: tuple[Tensor | None, ...],
    parameters: list[nn.Parameter],
    v: Float[Tensor, " n"],
    retain_graph: bool,
) -> Float[Tensor, " n"]:
    """The Hessian times ``v``: the derivative of the gradient's product with it."""
    sizes = [p.numel() for p in parameters]
    direction = [part.view_as(p).to(p.dtype) for part, p in zip(v.split(sizes), parameters, strict=True)]
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
    ).to(v)


def refuse_asymmetric(
    model: nn.Module, loss_fn: LossFunction | BatchLoss, batches: Batches, first: BatchGradient,
    parameters: list[nn.Parameter],
) -> None:  # fmt: skip
    """Raise if uᵀHv and vᵀHu differ for two random vectors: some operation has a wrong second derivative."""
    one, other, size = both_ways(first.gradients, parameters)
    eps, tiny = (max(getattr(torch.finfo(p.dtype), name) for p in parameters) for name in ("eps", "tiny"))
    if abs(one - other) <= max(1e-10, min(300 * eps, eps**0.5)) * size + tiny:  # below which no number has its digits
        return
    differ = f"uᵀHv = {one:.6g} but vᵀHu = {other:.6g} for random u, v"
    if not is_symmetric_in_float64(model, loss_fn, batches):
        raise ValueError(
            f"the second derivative is not symmetric ({differ}), so there are no eigenvalues: {culprits(model)}."
        )
    if abs(one - other) > ROUNDED * size:
        raise ValueError(
            f"the second derivative is lost in rounding ({differ}), as the model fits these examples so well: measure "
            "it in float64, with model.double() and inputs in float64."
        )


def both_ways(gradients: tuple[Tensor | None, ...], parameters: list[nn.Parameter]) -> tuple[float, float, float]:
    """uᵀHv and vᵀHu for two random vectors, and the size that such numbers have."""
    generator = own_generator(None)
    like = torch.cat([p.detach().flatten() for p in parameters])
    like = like.to(torch.promote_types(like.dtype, torch.float32))
    u, v = gaussian_like(like, generator), gaussian_like(like, generator)
    Hu, Hv = (product_with(gradients, parameters, w, retain_graph=True).double() for w in (u, v))
    size = (length(Hu) * length(v.double()) / math.sqrt(len(v))).item()
    return torch.dot(u.double(), Hv).item(), torch.dot(v.double(), Hu).item(), size


def is_symmetric_in_float64(model: nn.Module, loss_fn: LossFunction | BatchLoss, batches: Batches) -> bool:
    """Whether a copy of the model in float64 has a symmetric second derivative; False where there can be no such copy.

    The Hessian of a network that fits well is small beside what it is the difference of, and unequal by the rounding
    of float32 alone.
    """
    try:
        twin = copy.deepcopy(model).double()
        function = copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn
        wide = (mapped(lambda x: x.double() if x.is_floating_point() else x, batch) for batch in batches)
        parameters = [p for p in twin.parameters() if p.requires_grad]
        first = next(batch_gradients(twin, loss_of(function), wide, parameters))
        one, other, size = both_ways(first.gradients, parameters)
    except Exception:  # a model or a loss that knows no float64 may raise anything
        return False
    return abs(one - other) <= 1e-5 * size  # its own rounding is some 1e-17 over the loss


def culprits(model: nn.Module) -> str:
    """The layers whose weights are computed, which is where wrong second derivatives are known."""
    made = [name or "the model itself" for name, module in model.named_modules() if computes_weights(module)]
    if not made:
        return "look for a custom autograd function, or an operation whose double backward is wrong (gradgradcheck)"
    return (
        f"look at the parametrization of {', '.join(made[:5])}. The fused weight_norm of torch has a wrong second "
        "derivative: write g * v / v.norm() in plain operations, or remove the parametrization"
    )


def computes_weights(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return is_parametrized(module) or any(isinstance(hook, WeightNorm) for hook in hooks)

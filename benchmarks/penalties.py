"""The same penalty λ/2·Σσ² in the ways one would write it, and the floor of any of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from spectreg import SpectralNormRegularizer

Act = Callable[[], None]


def with_gradients(model: nn.Module) -> nn.Module:
    """The model with gradients of zero, whose memory has been touched."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.fill_(0.0)
    return model


def matrices(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.ndim > 1]


def ready(model: nn.Module, strength: float = 1e-9, **settings: object) -> SpectralNormRegularizer:
    """A regularizer past its warmup, on a model whose gradients are there."""
    regularizer = SpectralNormRegularizer(with_gradients(model), strength, **settings)  # type: ignore[arg-type]
    regularizer.sigma()
    return regularizer


def floor(weights: Sequence[Tensor], vectors: Sequence[Tensor] | None = None, strength: float = 1e-9) -> Act:
    """One read of each W (Wv) and one read-modify-write of its gradient (a rank-one add).

    With the top right singular vectors it adds what the regularizer adds: λ·Wv·vᵀ = λσuvᵀ.
    """
    vs = vectors or [torch.randn(W[0].numel()).to(W.dtype) for W in weights]
    us = [W.new_empty(len(W)) for W in weights]

    @torch.no_grad()
    def act() -> None:
        for W, v, u in zip(weights, vs, us, strict=True):
            torch.mv(W.detach().flatten(1), v, out=u)
            W.grad.flatten(1).addcmul_(u[:, None], v, value=strength)  # type: ignore[union-attr]

    return act


def bare(weights: Sequence[Tensor], vectors: Sequence[Tensor], strength: float = 1e-9) -> Act:
    """A whole power step and the gradient in torch calls, one weight after the other."""

    @torch.no_grad()
    def act() -> None:
        for W, v in zip(weights, vectors, strict=True):
            flat = W.flatten(1)
            u = torch.mv(flat, v)
            u.div_(torch.linalg.vector_norm(u))
            w = torch.mv(flat.t(), u)
            torch.div(w, torch.linalg.vector_norm(w), out=v)
            W.grad.flatten(1).addr_(u, w, alpha=strength)  # type: ignore[union-attr]

    return act


def by_autograd(weights: Sequence[Tensor], vectors: Sequence[Tensor], strength: float = 1e-9) -> Act:
    """The usual recipe: a power step without a graph, then σ = uᵀWv with one, squared, summed, backward."""

    def act() -> None:
        total = torch.zeros(())
        for W, v in zip(weights, vectors, strict=True):
            flat = W.flatten(1)
            with torch.no_grad():
                u = nn.functional.normalize(flat @ v, dim=0)
                v.copy_(nn.functional.normalize(flat.t() @ u, dim=0))
            total = total + torch.dot(u, flat @ v).square()
        (strength / 2 * total).backward()

    return act


def by_svd(weights: Sequence[Tensor], strength: float = 1e-9) -> Act:
    """σ by a singular value decomposition with a gradient."""

    def act() -> None:
        for W in weights:
            (strength / 2 * torch.linalg.matrix_norm(W.flatten(1), 2).square()).backward()

    return act


def by_penalty(regularizer: SpectralNormRegularizer) -> Act:
    return lambda: regularizer.penalty().backward()


def normalized(model: nn.Module) -> nn.Module:
    """The model with torch's ``spectral_norm`` on every weight."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            spectral_norm(module)
        elif isinstance(module, nn.MultiheadAttention):
            spectral_norm(module, "in_proj_weight")
    return model


def parametrized_weights(model: nn.Module) -> Act:
    """What the parametrizations of ``model`` cost a step: each weight computed once, and its gradient."""
    owners = [(m, n) for m in model.modules() if hasattr(m, "parametrizations") for n in m.parametrizations]
    gradients = [torch.randn_like(getattr(m, n)) for m, n in owners]

    def act() -> None:
        weights = [getattr(m, n) for m, n in owners]
        torch.autograd.backward(weights, gradients)

    return act

"""The same penalty λ/2·Σσ² in the ways one would write it, and the floor of any of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.harness import same
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


def autograd_term(weights: Sequence[Tensor], vectors: Sequence[Tensor], strength: float = 1e-9) -> Tensor:
    """The usual recipe: a power step without a graph, then σ = uᵀWv with one, squared, summed."""
    total = torch.zeros(())
    for W, v in zip(weights, vectors, strict=True):
        flat = W.flatten(1)
        with torch.no_grad():
            u = nn.functional.normalize(flat @ v, dim=0)
            v.copy_(nn.functional.normalize(flat.t() @ u, dim=0))
        total = total + torch.dot(u, flat @ v).square()
    return strength / 2 * total


def by_autograd(weights: Sequence[Tensor], vectors: Sequence[Tensor], strength: float = 1e-9) -> Act:
    return lambda: autograd_term(weights, vectors, strength).backward()


def by_svd(weights: Sequence[Tensor], strength: float = 1e-9) -> Act:
    """σ by a singular value decomposition with a gradient."""

    def act() -> None:
        for W in weights:
            (strength / 2 * torch.linalg.matrix_norm(W.flatten(1), 2).square()).backward()

    return act


def by_penalty(regularizer: SpectralNormRegularizer) -> Act:
    return lambda: regularizer.penalty().backward()


def check() -> float:
    """How far the gradients of all these ways lie apart, once their vectors have converged; an error if that is far."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(3)])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.outer(torch.randn(64), torch.randn(64)) / 8)
    weights = matrices(model)
    vectors = [torch.linalg.svd(W.detach())[2][0].clone() for W in weights]
    ours = ready(model, 1.0, warmup=60)
    acts = {"ours": ours.add_gradient, "penalty()": by_penalty(ours), "floor": floor(weights, vectors, 1.0)}
    acts |= {"bare torch calls": bare(weights, vectors, 1.0), "autograd": by_autograd(weights, vectors, 1.0)}
    acts |= {"SVD": by_svd(weights, 1.0)}
    found = {}
    for name, act in acts.items():
        with_gradients(model)
        act()
        found[name] = torch.cat([W.grad.flatten() for W in weights])  # type: ignore[union-attr]
    return max(same(name, g, found["ours"], 1e-4) for name, g in found.items())


def normalized(model: nn.Module) -> nn.Module:
    """The model with torch's ``spectral_norm`` on every weight."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            spectral_norm(module)
        elif isinstance(module, nn.MultiheadAttention):
            spectral_norm(module, "in_proj_weight")
    return model


def lipschitz_layers(model: nn.Module) -> nn.Module:
    """The model with deel-torchlip's layers (spectral norm, then Björck) for its linear layers and convolutions.

    Their convolutions go round in circles and take no stride; the cost of their weights does not depend on it.
    """
    from deel.torchlip.modules import SpectralConv2d, SpectralLinear

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            bias = getattr(child, "bias", None) is not None
            if isinstance(child, nn.Conv2d):
                shape = child.in_channels, child.out_channels, child.kernel_size
                setattr(parent, name, SpectralConv2d(*shape, padding=child.padding, bias=bias))
            elif type(child) is nn.Linear:
                setattr(parent, name, SpectralLinear(child.in_features, child.out_features, bias=bias))
    return model


def parametrized_weights(model: nn.Module) -> Act:
    """What the parametrizations of ``model`` cost a step: each weight computed, and its gradient taken back.

    One weight at a time, as the layers of a network do it: all at once would hold a copy of every weight, in memory
    that the system has to provide anew (on an MLP of 5 × 1024, 24 ms for 12).
    """
    owners = [(m, n) for m in model.modules() if hasattr(m, "parametrizations") for n in m.parametrizations]
    gradients = [torch.randn_like(getattr(m, n)) for m, n in owners]

    def act() -> None:
        for (m, n), G in zip(owners, gradients, strict=True):
            getattr(m, n).backward(G)

    return act


def accumulation(weights: Sequence[Tensor]) -> Act:
    """What of the above is none of the parametrization's: each gradient added to what the parameter has."""
    gradients = [torch.randn_like(W) for W in weights]

    def act() -> None:
        for W, G in zip(weights, gradients, strict=True):
            W.view_as(W).backward(G)

    return act

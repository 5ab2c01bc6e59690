"""The same penalty λ/2·Σσ² in the ways one would write it, and the floor of any of them."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.harness import Call
from spectreg import SpectralNormRegularizer


def with_gradients(model: nn.Module) -> nn.Module:
    """The model with gradients of zero, whose memory has been touched."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.fill_(0.0)
    return model


def linears(count: int, size: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Linear layers with weights and gradients that are there."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count)])
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.uniform_(p, -0.01, 0.01)
    return with_gradients(model)


def matrices(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.ndim > 1]


def ready(model: nn.Module, strength: float = 1e-9, **settings: object) -> SpectralNormRegularizer:
    """A regularizer past its warmup, on a model whose gradients are there."""
    regularizer = SpectralNormRegularizer(with_gradients(model), strength, **settings)  # type: ignore[arg-type]
    regularizer.sigma()
    return regularizer


def floor(weights: Sequence[Tensor], vectors: Sequence[Tensor] | None = None, strength: float = 1e-9) -> Call:
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


def bare(weights: Sequence[Tensor], vectors: Sequence[Tensor], strength: float = 1e-9) -> Call:
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


def ways(
    model: nn.Module, strength: float = 1e-9, vectors: Sequence[Tensor] | None = None, warmup: int = 15
) -> dict[str, Call]:
    """Each way to have the penalty, as it acts between ``backward`` and the optimizer."""
    weights, more = matrices(model), {"strength": strength, "warmup": warmup}
    vs = vectors or [nn.functional.normalize(torch.randn(W[0].numel()), dim=0) for W in weights]
    ours, eighth, watching = ready(model, **more), ready(model, every=8, **more), ready(model, 0)
    return {
        "add_gradient": ours.add_gradient,
        "half steps": ready(model, steps=0.5, **more).add_gradient,
        "every=8": lambda: [eighth.add_gradient() for _ in range(8)],
        "strength=0": watching.add_gradient,
        "log()": watching.log,
        "penalty()": lambda: ours.penalty().backward(),
        "floor": floor(weights, [v.clone() for v in vs], strength),
        "torch calls by hand": bare(weights, [v.clone() for v in vs], strength),
        "autograd penalty": lambda: autograd_term(weights, vs, strength).backward(),
        "SVD penalty": lambda: [
            (strength / 2 * torch.linalg.matrix_norm(W.flatten(1), 2).square()).backward() for W in weights
        ],
    }


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


def parametrized_weights(model: nn.Module) -> Call:
    """What the parametrizations of ``model`` cost a step: each weight computed, and its gradient taken back."""
    owners = [(m, n) for m in model.modules() if hasattr(m, "parametrizations") for n in m.parametrizations]
    return each_backward([partial(getattr, m, n) for m, n in owners])


def accumulation(weights: Sequence[Tensor]) -> Call:
    """What of the above is none of the parametrization's: each gradient added to what the parameter has."""
    return each_backward([partial(W.view_as, W) for W in weights])


def each_backward(weights: Sequence[Callable[[], Tensor]]) -> Call:
    """One weight at a time, as the layers of a network do it: all at once would hold a copy of every weight."""
    gradients = [torch.randn_like(weight()) for weight in weights]

    def act() -> None:
        for weight, G in zip(weights, gradients, strict=True):
            weight().backward(G)

    return act

"""The largest error of each measure against an independent float64 oracle, over seeded random cases.

OMP_NUM_THREADS=1 python benchmarks/measure_errors.py
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectreg

CASES = 20


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(36, 20)).double()
    with torch.no_grad():
        model(torch.randn(16, 2, 6, 6, dtype=torch.float64))
    return model.eval()


def examples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 6, 6, dtype=torch.float64, generator=generator), torch.randint(
        20, (8,), generator=generator
    )


def dense_jacobians(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([torch.func.jacrev(lambda z: model(z[None])[0])(xi).flatten(1) for xi in x])


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    names, values = zip(*((name, p.detach()) for name, p in model.named_parameters()), strict=True)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([v.numel() for v in values])
        state = {n: part.view_as(v) for n, part, v in zip(names, parts, values, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (x,)), y)

    return torch.func.hessian(loss)(torch.cat([v.flatten() for v in values]))


def spectra(seed: int) -> float:
    W = torch.randn(40, 60, generator=torch.Generator().manual_seed(seed))
    truth = np.linalg.svd(W.double().numpy(), compute_uv=False)
    return np.abs(spectreg.singular_values({"W": W})["W"].values[0].numpy() - truth).max() / truth[0]


def top(seed: int) -> float:
    W = torch.randn(90, 120, generator=torch.Generator().manual_seed(seed))
    truth = np.linalg.svd(W.double().numpy(), compute_uv=False)[:4]
    return np.abs(spectreg.singular_values({"W": W}, top=4)["W"].values[0].numpy() / truth - 1).max()


def convolution(seed: int) -> tuple[nn.Conv2d, float]:
    torch.manual_seed(seed)
    layer = nn.Conv2d(3, 4, 3, stride=1 + seed % 2, padding=seed % 3, dilation=1 + seed % 2, bias=False).double()
    eye = torch.eye(3 * 64, dtype=torch.float64).view(-1, 3, 8, 8)
    return layer, np.linalg.svd(layer(eye).flatten(1).detach().numpy(), compute_uv=False)[0]


def norm(seed: int) -> float:
    layer, truth = convolution(seed)
    return abs(spectreg.operator_norm(layer, (3, 8, 8)).value / truth - 1)


def norm_of_a_wide_input(seed: int) -> float:
    """Where the iteration starts from a wave."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(2, 2, 3, padding=1, bias=False).double()
    eye = torch.eye(2 * 28 * 28, dtype=torch.float64).view(-1, 2, 28, 28)
    A = layer(eye).flatten(1).detach()
    truth = torch.linalg.eigvalsh(A @ A.T)[-1].sqrt().item()
    return abs(spectreg.operator_norm(layer, (2, 28, 28)).value / truth - 1)


def tight_bound(seed: int) -> float:
    layer, truth = convolution(seed)
    excess = spectreg.operator_norm(layer, (3, 8, 8), tight=True).upper / truth - 1
    assert excess >= 0
    return excess


def bound(seed: int) -> float:
    model, (x, _) = network(seed), examples(seed)
    local = torch.linalg.matrix_norm(dense_jacobians(model, x).detach(), 2).max().item()
    return local / spectreg.lipschitz_bound(model, (2, 6, 6)).value


def jacobian(exact: bool) -> Callable[[int], float]:
    def error(seed: int) -> float:
        model, (x, _) = network(seed), examples(seed)
        truth = torch.linalg.matrix_norm(dense_jacobians(model, x), 2)
        return (spectreg.jacobian_norm(model, x, exact=exact, max_iterations=1000).value / truth - 1).abs().max().item()

    return error


def frobenius(seed: int) -> float:
    model, (x, _) = network(seed), examples(seed)
    truth = dense_jacobians(model, x).square().sum((1, 2)).sqrt()
    return (spectreg.jacobian_frobenius_norm(model, x).value / truth - 1).abs().max().item()


def input_gradient(seed: int) -> float:
    model, (x, y) = network(seed), examples(seed)
    rows = torch.einsum("bo,boi->bi", model(x).softmax(1) - F.one_hot(y, 20), dense_jacobians(model, x))
    truth = rows.norm(dim=1).mean().item()
    return abs(spectreg.input_gradient_norm(model, F.cross_entropy, [(x, y)]).value / truth - 1)


def stretch(kind: str) -> Callable[[int], float]:
    """Of a linear model with the loss ⟨g, Wx⟩: every perturbation and what it does are known."""

    def error(seed: int) -> float:
        torch.manual_seed(seed)
        model, g = nn.Linear(12, 5, bias=False).double(), torch.randn(5, dtype=torch.float64)
        x, y = torch.randn(8, 12, dtype=torch.float64), torch.zeros(8)
        (point,) = spectreg.perturbation_curve(model, lambda o, t: (o @ g).sum(), [(x, y)], [0.7], kind)
        pulled = g @ model.weight.detach()
        truth = (model.weight.detach() @ pulled / pulled.norm()).norm().item()
        loss = (model(x) @ g).mean().item() + 0.7 * pulled.norm().item()
        return max(abs(point.stretch / truth - 1), abs(point.loss / loss - 1))

    return error


def gap(seed: int) -> float:
    training, test = np.random.default_rng(seed).random((2, 50))
    truth = (training - test)[test > 0.3].min()
    return abs(spectreg.generalization_gap(list(training), list(test), 0.3) - truth)


def hessian(seed: int) -> float:
    model, (x, y) = network(seed), examples(seed)
    truth = torch.linalg.eigvalsh(dense_hessian(model, x, y))[-1].item()
    return abs(spectreg.hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)]).values[0] / truth - 1)


def penalty(seed: int) -> float:
    model, (x, _) = network(seed), examples(seed)
    truth = dense_jacobians(model, x).square().sum((1, 2)).mean()
    return abs(spectreg.jacobian_penalty(model, x) / truth - 1).item()


def adversarial(seed: int) -> float:
    model, (x, y) = network(seed), examples(seed)
    losses = []
    for xi, yi in zip(x, y, strict=True):
        g = torch.func.grad(lambda z, yi=yi: F.cross_entropy(model(z[None]), yi[None]))(xi)
        pair = torch.stack([xi, xi + g / g.norm()])
        losses.append(F.cross_entropy(model(pair), yi.expand(2)))
    return abs(spectreg.adversarial_loss(model, F.cross_entropy, x, y) / torch.stack(losses).mean() - 1).item()


ROWS = {
    "singular values, float32 weight, of σ₁ | NumPy SVD in float64": spectra,
    "the 4 largest, float32, relative | NumPy SVD in float64": top,
    "operator norm at the default tolerance | SVD of the dense convolution": norm,
    "the same on 28², from a wave | SVD of the dense convolution": norm_of_a_wide_input,
    "its tight bound: excess over the truth | SVD of the dense convolution": tight_bound,
    "largest local ‖J‖₂ over the network's bound (must be ≤ 1) | dense Jacobian": bound,
    "Jacobian norm, formed | dense Jacobian": jacobian(exact=True),
    "Jacobian norm, power iteration to 1e-3 | dense Jacobian": jacobian(exact=False),
    "Jacobian Frobenius norm | dense Jacobian": frobenius,
    "input gradient norm | closed form from the dense Jacobian": input_gradient,
    "Hessian eigenvalue, Lanczos to 1e-3 | torch.func.hessian": hessian,
    "perturbation by the gradient: stretch and loss | closed form of a linear model": stretch("gradient"),
    "perturbation by PGD: stretch and loss | closed form of a linear model": stretch("pgd"),
    "generalization gap | NumPy": gap,
    "Jacobian penalty | dense Jacobian": penalty,
    "adversarial loss | Eq. (3) example by example": adversarial,
}

if __name__ == "__main__":
    for name, error in ROWS.items():
        print(f"{name} | {max(error(seed) for seed in range(CASES)):.1e}", flush=True)

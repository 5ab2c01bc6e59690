"""Caps and products beside a power step on the same weights.

Before each round the weights are put back to where they press against their caps, which is timed with neither side. The
peers: an SVD of each weight, and the penalty on a product that is formed, with vectors as warm as ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import penalties as by
from benchmarks.alone import linears
from benchmarks.harness import Call, in_turn, ratio, record, same
from spectreg import SpectralNormCap, SpectralNormRegularizer, named_products

NAME = "caps and products"
SECONDS = 60
SIZES = ((8, 64), (8, 256), (2, 1024))
HEADS, WIDTH = 16, 1024
WHY = {
    "add_gradient": "After a cut many values are equal to the cap, and which of them the next step raises most, few "
    "products cannot tell: five of eight vectors each to scale, all singular values of the weight to clip.",
    "the factors": "A step takes two products with each factor, as with a weight, and the gradient one more.",
}


@torch.no_grad()
def clipped_by_svd(weights: list[Tensor], cap: float) -> None:
    for W in weights:
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        W.copy_(U * S.clamp_max(cap) @ V)


def caps(count: int, size: int) -> None:
    model = linears(count, size)
    weights = by.matrices(model)
    start = [W.detach().clone() for W in weights]
    cap = 0.9 * max(float(torch.linalg.matrix_norm(W, 2)) for W in start)

    @torch.no_grad()
    def back() -> None:
        for W, before in zip(weights, start, strict=True):
            W.copy_(before)

    scale, clip = SpectralNormCap(model, cap), SpectralNormCap(model, cap, by="clip")
    clip.apply()
    ours = [W.detach().clone() for W in weights]
    back()
    clipped_by_svd(weights, cap)
    same("clipped weights", torch.stack(ours), torch.stack([W.detach() for W in weights]), 1e-5)
    calls: dict[str, Call] = {
        "add_gradient": by.ready(model).add_gradient,
        "cap far above": SpectralNormCap(model, 100 * cap).apply,
        "cap, scale": scale.apply,
        "cap, clip": clip.apply,
        "clip by SVD": lambda: clipped_by_svd(weights, cap),
    }
    case = f"{count} × {size}²"
    times = in_turn(calls, rounds=9, between=back)
    for name in list(calls)[1:]:
        record(ratio(NAME, case, name, "add_gradient", times, why=WHY["add_gradient"]))
    record(ratio(NAME, case, "cap, clip", "clip by SVD", times))


def formed(layer: nn.MultiheadAttention, strength: float) -> Callable[[], None]:
    """The same penalty on every W_QᵀW_K, formed, with a warm vector for each."""
    W = layer.in_proj_weight
    v = F.normalize(torch.randn(HEADS, WIDTH, 1), dim=1)

    def act() -> None:
        Q, K = (part.unflatten(0, (HEADS, -1)) for part in W.chunk(3)[:2])
        A = Q.mT @ K
        with torch.no_grad():
            u = F.normalize(A @ v, dim=1)
            v.copy_(F.normalize(A.mT @ u, dim=1))
        sigma = (u.mT @ A @ v).flatten()
        (strength / 2 * sigma.square().sum()).backward()

    return act


def products() -> None:
    torch.manual_seed(0)
    layer = by.with_gradients(nn.MultiheadAttention(WIDTH, HEADS, bias=False))
    regularizer = SpectralNormRegularizer(named_products(layer, "logits"), 1e-9)
    regularizer.sigma()
    both = SpectralNormRegularizer(layer, 1e-9, map={"in_proj_weight": "heads"}, select=lambda name, _: "in" in name)
    both.sigma()
    calls = {
        "logits": regularizer.add_gradient,
        "the factors": both.add_gradient,
        "the product formed": formed(layer, 1e-9),
    }
    times = in_turn(calls, rounds=9)
    for name in list(calls)[1:]:
        record(ratio(NAME, f"‖W_QᵀW_K‖ of {HEADS} heads of {WIDTH}", "logits", name, times, why=WHY.get(name, "")))


def main() -> None:
    for count, size in SIZES:
        caps(count, size)
    products()

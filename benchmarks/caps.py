"""Caps and products beside a power step on the same weights.

Before each call the weights are put back to where they press against their caps, which is timed with neither side. The
peers: an SVD of each weight, and the penalty on a product that is formed, with vectors as warm as ours.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import penalties as by
from benchmarks.harness import Call, compare
from spectreg import SpectralNormCap, SpectralNormRegularizer, named_products

NAME = "caps and products"
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
    model = by.linears(count, size)
    weights = by.matrices(model)
    start = [W.detach().clone() for W in weights]
    cap = 0.9 * max(float(torch.linalg.matrix_norm(W, 2)) for W in start)

    @torch.no_grad()
    def back() -> None:
        for W, before in zip(weights, start, strict=True):
            W.copy_(before)

    calls: dict[str, Call] = {
        "add_gradient": by.ready(model).add_gradient,
        "cap far above": SpectralNormCap(model, 100 * cap).apply,
        "cap, scale": SpectralNormCap(model, cap).apply,
        "cap, clip": SpectralNormCap(model, cap, by="clip").apply,
        "clip by SVD": lambda: clipped_by_svd(weights, cap),
    }
    rows = [(name, "add_gradient", {"why": WHY["add_gradient"]}) for name in list(calls)[1:]]
    compare(NAME, f"{count} × {size}²", calls, [*rows, ("cap, clip", "clip by SVD", {})], rounds=9, between=back)


def formed(layer: nn.MultiheadAttention, strength: float) -> Call:
    """The same penalty on every W_QᵀW_K, formed, with a warm vector for each."""
    v = F.normalize(torch.randn(HEADS, WIDTH, 1), dim=1)

    def act() -> None:
        Q, K = (part.unflatten(0, (HEADS, -1)) for part in layer.in_proj_weight.chunk(3)[:2])
        A = Q.mT @ K
        with torch.no_grad():
            u = F.normalize(A @ v, dim=1)
            v.copy_(F.normalize(A.mT @ u, dim=1))
        (strength / 2 * (u.mT @ A @ v).square().sum()).backward()

    return act


def products() -> None:
    torch.manual_seed(0)
    layer = by.with_gradients(nn.MultiheadAttention(WIDTH, HEADS, bias=False))
    regularizer = SpectralNormRegularizer(named_products(layer, "logits"), 1e-9)
    both = by.ready(layer, map={"in_proj_weight": "heads"}, select=lambda name, _: "in" in name)
    calls = {
        "logits": regularizer.add_gradient,
        "the factors": both.add_gradient,
        "the product formed": formed(layer, 1e-9),
    }
    rows = [("logits", name, {"why": WHY.get(name, "")}) for name in list(calls)[1:]]
    compare(NAME, f"‖W_QᵀW_K‖ of {HEADS} heads of {WIDTH}", calls, rows, rounds=9)


def main() -> None:
    for count, size in SIZES:
        caps(count, size)
    products()

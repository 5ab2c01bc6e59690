"""Certified upper bounds on the norm of a convolution with any stride, padding, dilation and groups.

With stride s a convolution is one of stride 1 on the s × s × … phases of its input. With zero padding it is a part of
an infinite convolution, whose norm is the supremum of σ(K(ω)) over frequencies ω, K(ω) = Σ_t W_t e^{-iω·t}
(Sedghi et al., arXiv:1805.10408). A transposed convolution has the norm of the convolution it transposes.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spectreg.maps.convolution import OperatorMap, in_each, padding_of

ROUNDING = 1 + 1e-10  # a certificate stays one when float64 rounds it
CHUNK = 2**22  # entries of K(ω) in memory at a time


def norm_bound(layer: _ConvNd, input_size: tuple[int, ...], weight: Tensor | None = None, *, grid: int = 40) -> float:
    """An upper bound on the norm of ``layer`` on inputs of ``input_size`` (without batch and channels).

    ``weight`` takes the place of the layer's own. For zero padding the bound exceeds the truth only by what the border
    takes away, and, where ``input_size`` plus the kernel exceeds ``grid``, by the factor 1/cos(π(k−1)/2·grid) a
    dimension (1.003 for a 3-tap kernel).

    >>> layer = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> round(norm_bound(layer, (32, 32)), 4)  # all frequencies at zero: the sum of the kernel
    9.0
    """
    phases = exact_phases(layer, weight)
    tight = fourier_bound(phases, circle_size(layer, input_size, phases.shape[3:]), grid)
    return min(tight, taps_bound(phases)) * padding_growth(layer, input_size) * ROUNDING


def quick_norm_bound(layer: _ConvNd, input_size: tuple[int, ...], weight: Tensor | None = None) -> float:
    """A looser upper bound, at the price of one spectral norm: ``√taps`` times that of the reshaped kernel.

    >>> layer = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> round(quick_norm_bound(layer, (32, 32)), 4)  # √9 · ‖1₉‖
    9.0
    """
    return taps_bound(exact_phases(layer, weight)) * padding_growth(layer, input_size) * ROUNDING


def exact_phases(layer: _ConvNd, weight: Tensor | None) -> Float[Tensor, "groups outputs inputs *taps"]:
    """``kernel_phases`` of the layer's weight, or of the one given, in float64."""
    W = (layer.weight if weight is None else weight).detach().to("cpu", torch.float64)
    if not W.isfinite().all():
        raise ValueError(f"the weight of {layer} has entries that are NaN or infinite: it has no norm.")
    return kernel_phases(layer, W)


def kernel_phases(layer: _ConvNd, W: Tensor) -> Float[Tensor, "groups outputs inputs *taps"]:
    """The kernel of the stride-1 convolution on the phases of the input that ``layer`` with the weight W amounts to.

    Of a transposed convolution, of the one that it transposes: ``outputs`` are then its inputs.
    """
    W = W.unflatten(0, (layer.groups, -1))
    for dim, (s, d) in enumerate(zip(*strides_of(layer), strict=True)):
        if s > 1 or d > 1:
            W = split_phases(W.movedim(3 + dim, -1), s, d).movedim(-1, 3 + dim)
    return W


def split_phases(W: Float[Tensor, "groups outputs inputs *rest taps"], s: int, d: int) -> Tensor:
    """The last dimension dilated by ``d``, then its taps t = q·s + r split into tap q of input phase r."""
    k = W.shape[-1]
    dilated = W.new_zeros(*W.shape[:-1], -(-((k - 1) * d + 1) // s) * s)
    dilated[..., : (k - 1) * d + 1 : d] = W
    return dilated.unflatten(-1, (-1, s)).movedim(-1, 3).flatten(2, 3)


def taps_bound(W: Float[Tensor, "groups outputs inputs *taps"]) -> float:
    """``√taps`` times the norm of the kernel reshaped with the taps beside the inputs, or beside the outputs."""
    W = W.flatten(3)
    W = W[..., W.abs().amax((0, 1, 2)) > 0]
    if W.numel() == 0:
        return 0.0
    norms = [largest(W.flatten(2)), largest(W.transpose(1, 2).flatten(2))]
    return math.sqrt(W.shape[3]) * min(norms)


def fourier_bound(W: Float[Tensor, "groups outputs inputs *taps"], circle: tuple[int, ...], grid: int) -> float:
    """The norm of the circular convolution on ``circle`` points: the largest σ(K(ω)) on that grid of frequencies.

    Where a dimension has more than ``grid`` points, N fewer ones are used: a trigonometric polynomial of degree
    (taps−1)/2 exceeds its largest value on them at most by the factor 1/cos(π(taps−1)/2N) (M. Riesz; Ehlich &
    Zeller, Math. Z. 86, 1964).
    """
    taps = W.shape[3:]
    points = [1 if k == 1 else n if n <= grid else max(grid, 2 * k) for n, k in zip(circle, taps, strict=True)]
    growth = [
        1.0 if n == N else 1 / math.cos(math.pi * (k - 1) / (2 * N))
        for N, n, k in zip(points, circle, taps, strict=True)
    ]
    return max(largest(K) for K in symbols(W, points)) * math.prod(growth)


def symbols(W: Float[Tensor, "groups outputs inputs *taps"], points: list[int]) -> Iterator[Complex[Tensor, "..."]]:
    """K(ω) on the grid, some frequencies at a time; of each pair ±ω one."""
    frequencies = [torch.fft.fftfreq(N, dtype=torch.float64, device="cpu") for N in points]
    frequencies[-1] = frequencies[-1][: points[-1] // 2 + 1]
    omega = 2 * math.pi * torch.cartesian_prod(*frequencies).reshape(-1, len(points))
    t = torch.cartesian_prod(*[torch.arange(k, dtype=torch.float64, device="cpu") for k in W.shape[3:]]).reshape(
        -1, len(points)
    )
    W = W.flatten(3)
    for some in omega.split(max(1, CHUNK // math.prod(W.shape[:3]))):
        angle = some @ t.T
        yield torch.complex(
            torch.einsum("goit,ft->gfoi", W, angle.cos()), torch.einsum("goit,ft->gfoi", W, -angle.sin())
        )


def largest(A: Tensor) -> float:
    """The largest singular value of a stack of matrices."""
    A = A if A.shape[-2] <= A.shape[-1] else A.mH
    return torch.linalg.eigvalsh(A @ A.mH)[..., -1].max().clamp_min(0).sqrt().item()


def circle_size(layer: _ConvNd, input_size: tuple[int, ...], taps: tuple[int, ...]) -> tuple[int, ...]:
    """Points a dimension of the smallest circular convolution of which ``layer`` is a part.

    The m outputs (of a transposed convolution: inputs) read m + taps − 1 points, all of them different.
    """
    if wraps(layer):
        return input_size
    m = input_size
    if not isinstance(layer, _ConvTransposeNd):
        m = OperatorMap.of(layer, input_size).output_shape[1:]
    return tuple(n + k - 1 for n, k in zip(m, taps, strict=True))


def strides_of(layer: _ConvNd) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Stride and dilation in each dimension."""
    dimensions = len(layer.kernel_size)
    return in_each(layer.stride, dimensions), in_each(layer.dilation, dimensions)


def added(layer: _ConvNd) -> list[int]:
    """How many points padding adds, by dimension."""
    amounts = padding_of(layer)
    return [a + b for a, b in zip(amounts[::2], amounts[1::2], strict=True)][::-1]


def wraps(layer: _ConvNd) -> bool:
    """Whether the kernel eats up all that circular padding adds: then the layer is part of a circular convolution."""
    strides, gaps = strides_of(layer)
    spans = [d * (k - 1) for k, d in zip(layer.kernel_size, gaps, strict=True)]
    eaten = all(a <= span for a, span in zip(added(layer), spans, strict=True))
    return layer.padding_mode == "circular" and eaten and set(strides) == {1}


def padding_growth(layer: _ConvNd, input_size: tuple[int, ...]) -> float:
    """The norm of the padding: √ of how often it repeats an entry; 1 for zeros and where the layer wraps."""
    if layer.padding_mode == "zeros" or wraps(layer):
        return 1.0
    with torch.enable_grad():
        x = torch.zeros(1, 1, *input_size, dtype=torch.float64, requires_grad=True, device="cpu")
        border = padding_of(layer)
        (repeats,) = torch.autograd.grad(F.pad(x, border, mode=layer.padding_mode).sum(), x)
    return math.sqrt(repeats.max().item())

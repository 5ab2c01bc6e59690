"""The plane wave that a convolution stretches most: where an iteration for its norm may start.

Away from the border the wave ``e^{iω·p} v`` becomes ``e^{iω·p} K(ω)v``. On a finite input the top singular vectors are
nearly such waves, of the frequency with the largest σ(K(ω)), under half a period of a sine in each dimension.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional as F

from spectreg.linalg.directions import gaussian_like

CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TILE, STEPS = 16, 20  # points a dimension on which all frequencies are compared, by so many power steps
CANDIDATES, ROUNDS = 8, 5  # frequencies that are refined, each round at half the distance


def top_waves(
    kernel: Float[Tensor, "groups outputs inputs *taps"],
    size: tuple[int, ...],
    generator: torch.Generator,
    count: int = 1,
) -> Float[Tensor, "count channels *size"]:
    """The outputs of a stride-1 convolution, on ``size`` points, that its transpose stretches most, or nearly so.

    Power iteration on a small circle shows promising frequencies; each is refined together with its vector. Where
    there are fewer than ``count`` frequencies, the last one is repeated.

    >>> difference = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)  # |K(ω)| = |1 − e^{iω}| is largest at ω = π
    >>> (wave,) = top_waves(difference, (5,), torch.Generator().manual_seed(0))
    >>> (wave / wave[0, 2]).round(decimals=2)
    tensor([[ 0.5000, -0.8700,  1.0000, -0.8700,  0.5000]])
    """
    group, omega, u = promising(kernel, generator)
    if len(kernel) == 1:  # all candidates beside one matrix; else each with its group's
        W, omega, u = kernel, omega[None], u.T[None]
    else:
        W, omega, u = kernel[group], omega[:, None], u[:, :, None]
    omega, u, gain = refined(W, omega, u)
    omega, vectors = omega.flatten(0, 1), u.movedim(2, 1).flatten(0, 1)
    return torch.stack([
        windowed(omega[i], placed(vectors[i], int(group[i]), len(kernel)), size)
        for i in best(gain.flatten(), group, omega, count)
    ])  # fmt: skip


def best(gain: Tensor, group: Tensor, omega: Float[Tensor, "c dimensions"], count: int) -> list[int]:
    """The candidates with the largest gain; of those that have run to one frequency of one group, one."""
    chosen: list[int] = []
    for i in gain.argsort(descending=True).tolist():
        apart = [group[i] != group[j] or distance(omega[i], omega[j]) > math.pi / TILE for j in chosen]
        if all(apart) and len(chosen) < count:
            chosen.append(i)
    return chosen + chosen[-1:] * (count - len(chosen))


def distance(omega: Tensor, other: Tensor) -> float:
    """The largest difference of two frequencies, of which either sign is the same wave."""
    around = [torch.remainder(omega + sign * other + math.pi, 2 * math.pi) - math.pi for sign in (-1, 1)]
    return min(difference.abs().max().item() for difference in around)


def placed(u: Complex[Tensor, " outputs"], group: int, groups: int) -> Complex[Tensor, " channels"]:
    """The vector of one group among the channels of all."""
    channels = u.new_zeros(groups, len(u))
    channels[group] = u
    return channels.flatten()


def tile(taps: tuple[int, ...]) -> list[int]:
    """Points a dimension of the circle on which frequencies are compared; a single tap makes all alike."""
    return [1 if k == 1 else max(TILE, 2 * k) for k in taps]


def promising(
    kernel: Float[Tensor, "groups outputs inputs *taps"], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Group, frequency and output vector of the waves that grow fastest under power iteration on a circle."""
    points = tile(tuple(kernel.shape[3:]))
    dims = tuple(range(-len(points), 0))
    y = gaussian_like(kernel.new_empty(1, kernel.shape[0] * kernel.shape[1], *points), generator)
    gram = circular_gram(kernel)
    for _ in range(STEPS):
        before = y / torch.linalg.vector_norm(y)
        y = gram(before)
    new, old = (torch.fft.rfftn(x.view(*kernel.shape[:2], *points), dim=dims) for x in (y, before))
    amplitude = old.norm(dim=1)
    growth = new.norm(dim=1) / amplitude.clamp_min(1e-3 * amplitude.max())  # below lies what rounding left of others
    top = growth.flatten().topk(min(CANDIDATES, growth.numel())).indices
    group, *frequency = torch.unravel_index(top, growth.shape)
    omega = torch.stack([2 * math.pi * j / n for j, n in zip(frequency, points, strict=True)], 1)
    return group, omega.to(y.dtype), new.movedim(1, -1)[(group, *frequency)]


def circular_gram(kernel: Float[Tensor, "groups outputs inputs *taps"]) -> Callable[[Tensor], Tensor]:
    """``y ↦ AAᵀy`` for the circular convolution A."""
    taps, groups = kernel.shape[3:], len(kernel)
    conv = CONVOLUTION[len(taps)]
    W, back = kernel.flatten(0, 1), kernel.transpose(1, 2).flatten(0, 1).flip(tuple(range(2, 2 + len(taps))))
    left = [n for k in reversed(taps) for n in (k - 1, 0)]
    right = [n for k in reversed(taps) for n in (0, k - 1)]

    def product(y: Tensor) -> Tensor:
        x = conv(F.pad(y, left, mode="circular"), back, groups=groups)
        return conv(F.pad(x, right, mode="circular"), W, groups=groups)

    return product


def refined(
    W: Float[Tensor, "g outputs inputs *taps"],
    omega: Float[Tensor, "g c dimensions"],
    u: Complex[Tensor, "g outputs c"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies and vectors after rounds of: the best frequency nearby for ``u``, a power step there; and σ."""
    lags = grid([range(k) for k in W.shape[3:]], omega)
    neighbours = grid([range(-1, 2)] * omega.shape[2], omega)
    matrix, inputs, tiny = W.flatten(2), W.shape[2], torch.finfo(omega.dtype).tiny
    for turn in range(ROUNDS):
        pulled = product(matrix.mT, u).unflatten(1, (inputs, -1))  # g, inputs, taps, c: Wᵀu, tap by tap
        near = omega[:, :, None] + math.pi / TILE / 2**turn * neighbours
        waves = torch.polar(near.new_ones(()), near @ lags.T)  # g, c, neighbours, taps
        v = waves.conj() @ pulled.movedim(3, 1).mT  # K(ω)ᴴu at each neighbour
        longest = v.norm(dim=3).argmax(2)[:, :, None, None]
        omega, wave, v = (torch.take_along_dim(x, longest, 2)[:, :, 0] for x in (near, waves, v))
        u = product(matrix, (v[..., None] * wave[:, :, None]).flatten(2).mT)
        sigma = u.norm(dim=1)
        u = u / sigma[:, None].clamp_min(tiny)
    return omega, u, sigma / v.norm(dim=2).clamp_min(tiny)


def grid(ranges: list[range], like: Tensor) -> Float[Tensor, "points dimensions"]:
    """All points whose coordinates lie in ``ranges``, in the type of ``like``."""
    return torch.cartesian_prod(*[torch.tensor(r, device="cpu") for r in ranges]).view(-1, len(ranges)).to(like)


def product(A: Float[Tensor, "g m n"], z: Complex[Tensor, "g n c"]) -> Complex[Tensor, "g m c"]:
    """A real matrix times a complex one."""
    parts = A @ torch.view_as_real(z).flatten(2)
    return torch.view_as_complex(parts.unflatten(2, (-1, 2)))


def windowed(omega: Float[Tensor, " dimensions"], u: Complex[Tensor, " channels"], size: tuple[int, ...]) -> Tensor:
    """The real part of ``e^{iω·p} u`` under a half sine in each dimension."""
    for n, frequency in zip(size, omega, strict=True):
        p = torch.arange(n, device="cpu").to(omega)
        u = u[..., None] * torch.polar(torch.sin(math.pi * (p + 1) / (n + 1)), frequency * p)
    return u.real

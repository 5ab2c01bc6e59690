"""Measure: the norm of one layer as the map it is, from below and from above."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spectreg.linalg.block_lanczos import largest_of_blocks
from spectreg.linalg.directions import gaussian_like, own_generator
from spectreg.linalg.lanczos import Goal
from spectreg.lipschitz.convolution_bound import ROUNDING, kernel_phases, largest, norm_bound, quick_norm_bound, wraps
from spectreg.lipschitz.layer_map import ConvolutionMap, OwnMap, dense
from spectreg.lipschitz.plane_wave import tile, top_waves
from spectreg.maps.behaviour import acts_as, undisturbed
from spectreg.maps.convolution import OperatorMap
from spectreg.maps.matrix import MatrixMap

WAVES, STARTS = 2, 3  # first vectors: one alone might be nearly orthogonal to the top vector
CHANCE = 0.02  # length of the random part of a wave


@dataclass(frozen=True)
class OperatorNorm:
    """The norm of a layer as a map of its input, in units of the output per unit of the input.

    ``value`` never exceeds the norm but by rounding; a singular value lies within ``residual`` of it. ``upper`` is
    never below the norm; it is computed when it is first read, from the weight as it was. ``converged``: the residual
    met the tolerance, from several starts. Where the matrix was formed, residual and products are 0.
    """

    value: float
    residual: float
    products: int
    converged: bool
    bound: Callable[[], float] = field(repr=False, compare=False)

    @cached_property
    def upper(self) -> float:
        """A certified upper bound on the norm; infinite for a layer with a forward of its own."""
        return self.bound()


@torch.no_grad()
def operator_norm(
    layer: nn.Module,
    input_shape: tuple[int, ...],
    *,
    tight: bool = False,
    tolerance: float = 5e-3,
    max_products: int = 200,
    generator: torch.Generator | None = None,
) -> OperatorNorm:
    """The norm of a linear layer or of a convolution itself, whatever its stride, padding, dilation and groups.

    From the matrix where an input or an output, of one group, has up to 512 numbers; else by Lanczos on AᵀA from
    below. A layer with a forward of its own (weight standardization, hooks) or of another kind is measured through
    that forward and its gradients, if it is linear; nothing certifies it from above. In evaluation mode; a bias plays
    no part; the layer is left as found.

    Args:
        input_shape: Of one example: (channels, height, width) for a ``Conv2d``.
        tight: Certify by frequencies (``norm_bound``: within a few per cent, seconds for hundreds of channels) and
            not by the kernel alone (``quick_norm_bound``: often twice the norm, at the price of one matrix's).
        tolerance: Share of the value that the residual may be. The error of the value itself is of second order in
            it, over the gap to the next singular values: at most 2.6e-4 short on 288 random layers at the default, too
            large for their matrices (docs/measures.md).
        max_products: With AᵀA at most.
        generator: Draws the first vectors; by default a private one with seed 0.

    Raises:
        ValueError: A layer that is not linear; a shape it does not take; non-finite weights; a tolerance out of range.

    >>> layer = nn.Conv1d(1, 1, 2, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> norm = operator_norm(layer, (1, 2))
    >>> round(norm.value, 4)  # ‖(1, 1)‖₂
    1.4142
    """
    if not 0 < tolerance < 1 or max_products < 1:
        raise ValueError(
            f"tolerance is {tolerance}, max_products {max_products}: use 0 < tolerance < 1 and at least 1."
        )
    if not isinstance(input_shape, Sequence) or not all(isinstance(n, int) and n > 0 for n in input_shape):
        raise ValueError(f"input_shape is {input_shape!r}: give the shape of one example, such as (3, 32, 32).")
    if any(parameter.numel() == 0 for parameter in layer.parameters()):
        raise ValueError(f"{layer} has a parameter without entries: it has no norm.")
    input_shape = tuple(input_shape)
    goal, generator = Goal(1, tolerance, max_products), own_generator(generator)
    with undisturbed(layer), torch.inference_mode(False), torch.no_grad():
        require_finite(layer)
        if isinstance(layer, nn.Linear) and acts_as(layer, matrix_of(layer), (layer.in_features,)):
            require(layer, input_shape, input_shape[-1:] == (layer.in_features,), f"(…, {layer.in_features})")
            W, scale = scaled(layer.weight)
            return exact(W, scale)
        if isinstance(layer, _ConvNd):
            fits = len(input_shape) == 1 + len(layer.kernel_size) and input_shape[0] == layer.in_channels
            require(layer, input_shape, fits, f"({layer.in_channels}, {', '.join('n' for _ in layer.kernel_size)})")
            A = OperatorMap.of(layer, input_shape[1:])
            if acts_as(layer, A, input_shape):
                return norm_of_convolution(layer, A, tight, goal, generator)
        return norm_of_own_map(OwnMap(layer, input_shape), goal, generator)


def norm_of_convolution(
    layer: _ConvNd, A: OperatorMap, tight: bool, goal: Goal, generator: torch.Generator
) -> OperatorNorm:
    W, scale = scaled(layer.weight)
    bound = partial(norm_bound if tight else quick_norm_bound, layer, A.input_shape[1:], W)
    matrices = dense(ConvolutionMap(A, W))
    if matrices is not None:
        return exact(matrices, scale, bound)
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    m = ConvolutionMap(A, W.to(layer.weight.device, dtype))
    return iterated(m, first_vectors(layer, A, m.W, generator), scale, bound, goal)


def norm_of_own_map(m: OwnMap, goal: Goal, generator: torch.Generator) -> OperatorNorm:
    matrices = dense(m)
    if matrices is not None:
        return exact(matrices.to("cpu", torch.float64), m.scale, partial(float, "inf"))
    start = gaussian_like(m.like.new_empty(STARTS, m.sides[0]), generator)
    return iterated(m, start, m.scale, partial(float, "inf"), goal)


def exact(matrices: Tensor, scale: float, bound: Callable[[], float] | None = None) -> OperatorNorm:
    """The norm from the matrices, which certify themselves without a ``bound``; both are in units of ``scale``."""
    norm = largest(matrices)
    return OperatorNorm(scale * norm, 0.0, 0, True, lambda: scale * (bound() if bound else norm) * ROUNDING)


def iterated(
    m: ConvolutionMap | OwnMap, start: Tensor, scale: float, bound: Callable[[], float], goal: Goal
) -> OperatorNorm:
    """The norm by Lanczos on AᵀA in every block from every row of ``start``."""

    def gram(x: Tensor) -> Tensor:
        return m.adjoint(m.forward(x.flatten(1))).reshape(x.shape)

    top, _ = largest_of_blocks(gram, start.view(len(start), m.blocks, -1), goal)
    value = max(top.values[0], 0.0) ** 0.5
    residual = top.residuals[0] / value if value else 0.0
    return OperatorNorm(
        scale * value, scale * residual, top.products, top.converged, lambda: scale * bound() * ROUNDING
    )


def scaled(weight: Tensor) -> tuple[Tensor, float]:
    """The weight in float64, divided by its largest entry, and that: else squares of it could under- or overflow."""
    W = weight.detach().to("cpu").to(torch.float64, copy=True)
    if not W.isfinite().all():
        raise ValueError("the weight has entries that are NaN or infinite: it has no norm.")
    scale = W.abs().max().item() if W.numel() else 0.0
    return (W / scale, scale) if scale else (W, 1.0)


def matrix_of(layer: nn.Linear) -> MatrixMap:
    return MatrixMap((layer.out_features, layer.in_features))


def first_vectors(layer: _ConvNd, A: OperatorMap, W: Tensor, generator: torch.Generator) -> Tensor:
    """Random vectors; on an input large enough only a small part of them, beside the best plane waves.

    Padding that repeats entries stretches vectors at the border most, and a wave has none of these.
    """
    transposed = isinstance(layer, _ConvTransposeNd)
    size = (A.input_shape if transposed else A.output_shape)[1:]
    kernel = kernel_phases(layer, W)
    worthwhile = math.prod(size) >= 3 * math.prod(tile(kernel.shape[3:]))  # else the search costs more than it saves
    if not worthwhile or (layer.padding_mode != "zeros" and not wraps(layer)):
        return gaussian_like(W.new_empty(STARTS, A.inputs), generator)
    v = gaussian_like(W.new_empty(WAVES, A.inputs), generator)
    waves = top_waves(kernel, size, generator, WAVES).flatten(1)
    waves = waves if transposed else torch.stack([A.adjoint(W, wave) for wave in waves])
    length = waves.norm(dim=1, keepdim=True)
    return torch.where(length > 0, waves + CHANCE * length / v.norm(dim=1, keepdim=True) * v, v)  # a kernel may be zero


def require_finite(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} of {type(layer).__name__} is on the meta device and has no values: offloaded, or "
                "never loaded. Load the whole model onto one device."
            )
        if parameter.is_complex():
            raise ValueError(f"the {name} of {type(layer).__name__} is complex: only real maps are measured.")
        if not parameter.isfinite().all():
            kind = type(layer).__name__
            raise ValueError(f"the {name} of {kind} has entries that are NaN or infinite: it has no norm.")


def require(layer: nn.Module, input_shape: tuple[int, ...], fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"input_shape {input_shape} does not fit {layer}: it takes {wanted}, without the batch.")

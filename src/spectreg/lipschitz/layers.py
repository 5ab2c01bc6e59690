"""Rules for layers with weights, normalizations, pooling and resizing."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from spectreg.lipschitz.calls import Call, Number, Operand, UnknownConstantError, finite
from spectreg.lipschitz.convolution_bound import ROUNDING, largest, norm_bound

CONVOLUTION = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


def linear(call: Call, input: Operand, weight: Tensor, bias: Tensor | None = None) -> float:
    return largest(torch.atleast_2d(finite(weight))) * ROUNDING * input.bound


def product(call: Call, input: Operand | Any, other: Operand | Any) -> float:
    """Of matrices or stacks of them, one of them constant; a stack that broadcasting repeats counts so often."""
    if isinstance(input, Operand) and isinstance(other, Operand):
        raise UnknownConstantError("both factors depend on the input")
    x: Any
    constant: Any
    x, constant = (input, other) if isinstance(input, Operand) else (other, input)
    W = finite(constant)
    stacks = torch.broadcast_shapes(x.shape[:-2], W.shape[:-2])
    repeats = math.prod(stacks) / math.prod(x.shape[:-2])
    return largest(torch.atleast_2d(W)) * ROUNDING * math.sqrt(repeats) * x.bound


def convolution(
    call: Call, input: Operand, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> float:  # fmt: skip
    sizes: Any = tuple(weight.shape[2:])
    stride, dilation = per_dimension(stride, sizes), per_dimension(dilation, sizes)
    padding = padding if isinstance(padding, str) else per_dimension(padding, sizes)
    layer = CONVOLUTION[weight.ndim](
        weight.shape[1] * groups, len(weight), sizes, stride, padding, dilation, groups, False, device="meta"
    )
    return convolution_layer(call, input, layer, weight)


def transposed_convolution(
    call: Call, input: Operand, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> float:  # fmt: skip
    sizes: Any = tuple(weight.shape[2:])
    stride, padding, dilation = (per_dimension(each, sizes) for each in (stride, padding, dilation))
    layer = TRANSPOSED[weight.ndim](
        len(weight), weight.shape[1] * groups, sizes, stride, padding, 0, groups, False, dilation, device="meta"
    )
    return convolution_layer(call, input, layer, weight)


def convolution_layer(call: Call, input: Operand, layer: _ConvNd, weight: Tensor, output_size: Any = None) -> float:
    size = tuple(input.shape[-len(layer.kernel_size) :])
    return norm_bound(layer, size, finite(weight), grid=call.grid) * input.bound


def convolution_module(call: Call, input: Operand, output_size: Any = None) -> float:
    return convolution_layer(call, input, call.module, call.module.weight)


def batch_norm(
    call: Call, input: Operand, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: Any = 0.1, eps: Number = 1e-5,
) -> float:  # fmt: skip
    if training or running_var is None:
        raise UnknownConstantError("it keeps no running statistics, so an example's output depends on its batch")
    return channel_scale(running_var, weight, eps).abs().max().item() * ROUNDING * input.bound


def channel_scale(running_var: Tensor, weight: Tensor | None, eps: Number) -> Tensor:
    """What batch normalization multiplies each channel by, in float64."""
    scale = finite(torch.rsqrt(finite(running_var) + eps))
    return scale if weight is None else finite(weight) * scale


def normalized(weight: Any, eps: Number | None) -> float:
    """Of a normalization by the example's own statistics: largest where these vanish, ``max|γ|/√ε`` there.

    With n entries, mean square q of what is left after the mean is taken off, and s = q + ε, the Jacobian is
    ``(1 − zzᵀ/(n·s))/√s`` times projections, and ``zᵀz = n·q < n·s``: its norm is 1/√s at most.
    """
    if eps is None or eps <= 0:
        raise UnknownConstantError("without a positive eps it has no Lipschitz constant")
    return (1.0 if weight is None else finite(weight).abs().max().item()) / math.sqrt(eps) * ROUNDING


def fused(call: Call, input: Operand, norm: Any) -> float:
    """A linear layer or a convolution with the batch normalization after it, as one layer in float64."""
    weight = finite(call.module.weight)
    scale = channel_scale(norm.running_var, norm.weight, norm.eps)
    weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    if isinstance(call.module, nn.Linear):
        return linear(call, input, weight)
    return convolution_layer(call, input, call.module, weight)


def layer_norm(
    call: Call, input: Operand, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Number = 1e-5
) -> float:
    return normalized(weight, eps) * input.bound


def group_norm(
    call: Call, input: Operand, num_groups: int, weight: Any = None, bias: Any = None, eps: Number = 1e-5
) -> float:
    return normalized(weight, eps) * input.bound


def rms_norm(call: Call, input: Operand, normalized_shape: Any, weight: Any = None, eps: Number | None = None) -> float:
    return normalized(weight, eps) * input.bound


def instance_norm(
    call: Call, input: Operand, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, use_input_stats: bool = True, momentum: Any = 0.1, eps: Number = 1e-5,
) -> float:  # fmt: skip
    if use_input_stats:
        return normalized(weight, eps) * input.bound
    return batch_norm(call, input, running_mean, running_var, weight, bias, False, momentum, eps)


def instance_norm_module(call: Call, input: Operand) -> float:
    m = call.module
    own = m.running_var is None or not m.track_running_stats
    return instance_norm(call, input, m.running_mean, m.running_var, m.weight, use_input_stats=own, eps=m.eps)


def max_pool(
    call: Call, input: Operand, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False, *, d: int,
) -> float:  # fmt: skip
    """√ of the number of windows that an input lies in, at most."""
    if return_indices:
        raise UnknownConstantError("it returns indices")
    sizes = call.output.shape[-d:]
    k, p, gaps = (per_dimension(each, sizes) for each in (kernel_size, padding, dilation))
    s = per_dimension(stride or kernel_size, sizes)
    overlaps = 1.0
    for i, (n, size) in enumerate(zip(sizes, input.shape[-d:], strict=True)):
        windows = F.conv_transpose1d(
            torch.ones(1, 1, n, device="cpu"), torch.ones(1, 1, k[i], device="cpu"), stride=s[i], dilation=gaps[i]
        )
        overlaps *= windows[..., p[i] : p[i] + size].max().item()
    return math.sqrt(overlaps) * input.bound


def adaptive_max_pool(call: Call, input: Operand, output_size: Any, return_indices: bool = False, *, d: int) -> float:
    """√ of the number of windows that an input lies in: those of output i begin at ⌊in/o⌋ and end at ⌈(i+1)n/o⌉."""
    if return_indices:
        raise UnknownConstantError("it returns indices")
    overlaps = 1
    for o, n in zip(call.output.shape[-d:], input.shape[-d:], strict=True):
        hit = torch.zeros(n, device="cpu")
        for i in range(o):
            hit[i * n // o : -(-(i + 1) * n // o)] += 1
        overlaps *= int(hit.max())
    return math.sqrt(overlaps) * input.bound


def average_pool(
    call: Call, input: Operand, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None, *, d: int,
) -> float:  # fmt: skip
    """Exact: the product over dimensions of the norm of the pooling written as a matrix."""
    if divisor_override is not None:
        raise UnknownConstantError("divisor_override is not covered")
    sizes = call.output.shape[-d:]
    k, p = per_dimension(kernel_size, sizes), per_dimension(padding, sizes)
    s = per_dimension(stride or kernel_size, sizes)
    return separable(input, d, lambda i, eye: F.avg_pool1d(eye, k[i], s[i], p[i], ceil_mode, count_include_pad))


def adaptive_average_pool(call: Call, input: Operand, output_size: Any, *, d: int) -> float:
    sizes = call.output.shape[-d:]
    return separable(input, d, lambda i, eye: F.adaptive_avg_pool1d(eye, sizes[i]))


def interpolation(
    call: Call, input: Operand, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> float:  # fmt: skip
    """Exact: every mode works dimension by dimension."""
    d = call.output.ndim - 2
    scales = None if scale_factor is None else per_dimension(scale_factor, call.output.shape[2:])

    def along(i: int, eye: Tensor) -> Tensor:
        """The resizing of dimension i alone; others have equal points: one or two, as antialias tells them apart."""
        others = [min(2, n) for n in call.output.shape[2:]]
        x = eye.view(len(eye), 1, *[len(eye) if j == i else 1 for j in range(d)])
        x = x.expand(-1, -1, *[len(eye) if j == i else others[j] for j in range(d)])
        sides = [call.output.shape[2 + i] if j == i else others[j] for j in range(d)]
        factors = None if scales is None else [scales[i] if j == i else 1.0 for j in range(d)]
        resized = F.interpolate(
            x, None if factors else sides, factors, mode, align_corners, recompute_scale_factor, antialias
        )
        return resized.movedim(2 + i, 2).reshape(len(eye), 1, resized.shape[2 + i], -1)[..., 0]

    return separable(input, d, along)


def separable(input: Operand, d: int, along: Callable[[int, Tensor], Tensor]) -> float:
    """The product of the norms of a linear operation along each of the last ``d`` dimensions, given on unit vectors."""
    eyes = [torch.eye(n, dtype=torch.float64, device="cpu")[:, None] for n in input.shape[-d:]]
    return math.prod(largest(along(i, eye)[:, 0]) for i, eye in enumerate(eyes)) * ROUNDING * input.bound


def per_dimension(value: Any, sizes: Any) -> list[Any]:
    values = list(value) if isinstance(value, tuple | list) else [value]
    return values * len(sizes) if len(values) == 1 else values

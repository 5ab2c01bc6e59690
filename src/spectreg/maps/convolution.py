"""A convolution as the operator it is on inputs of a given size, and the sizes a network meets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spectreg.maps.base import Norm

PIECE = 1 << 20  # elements of a kernel that are in memory a second time; as fast as all at once, or faster


@dataclass(frozen=True)
class OperatorMap:
    """What a convolution does to an input of ``input_shape``, with its stride, padding, dilation and groups.

    Args:
        input_shape: Channels and size of the input.
        output_shape: Channels and size of the output.
        arguments: Those of ``torch.ops.aten.convolution`` after the bias: stride, padding, dilation, transposed,
            output padding, groups.
        border: ``F.pad``'s amounts and mode before the convolution, for padding it cannot do itself.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    arguments: tuple[Any, ...]
    border: tuple[tuple[int, ...], str] | None = None
    blocks: int = field(default=1, init=False)
    norm: Norm = field(default="max", init=False)

    @classmethod
    def of(cls, module: _ConvNd, input_size: tuple[int, ...]) -> "OperatorMap":
        """The operator of ``module`` on inputs of ``input_size`` (without batch and channels).

        >>> OperatorMap.of(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), (32, 32)).output_shape
        (8, 16, 16)
        """
        dimensions = len(module.kernel_size)
        sizes = tuple(input_size) if isinstance(input_size, Sequence) else (input_size,)
        if len(sizes) > 1 and all(isinstance(size, Sequence) for size in sizes):
            raise ValueError(f"{module} meets inputs of several sizes, {sizes}: its norm differs. Choose one of them.")
        if len(sizes) != dimensions or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ValueError(f"input_size {input_size!r} is no size for {module}: it has {dimensions} numbers.")
        transposed = isinstance(module, _ConvTransposeNd)
        border, padding = _padding(module)
        stride, dilation, extra = (
            list(in_each(a, dimensions)) for a in (module.stride, module.dilation, module.output_padding)
        )
        arguments = (stride, padding, dilation, transposed, extra, module.groups)
        input_shape = (module.in_channels, *sizes)
        try:
            with torch.device("meta"):
                W = torch.empty(_kernel_shape(module))  # not that of the weight: to read a parametrized one may move it
                x = _bordered(torch.empty(1, *input_shape), border)
                shape = torch.ops.aten.convolution(x, W, None, *arguments).shape
        except RuntimeError as error:
            raise ValueError(f"input_size {sizes} does not fit {module}: {error}") from error
        return cls(input_shape, tuple(shape[1:]), arguments, border)

    @property
    def outputs(self) -> int:
        """Numbers in an output."""
        return prod(self.output_shape)

    @property
    def inputs(self) -> int:
        """Numbers in an input."""
        return prod(self.input_shape)

    def forward(self, W: Tensor, v: Float[Tensor, "*m v"]) -> Float[Tensor, "*m u"]:
        """The convolution of each row of ``v``, in its precision."""
        u = v.new_zeros(v[..., :1].numel(), self.outputs)
        for p in self._parts(W, whole=W.dtype == v.dtype):
            x = _bordered(v[..., p.columns].reshape(-1, *p.map.input_shape), self.border)
            y = torch.ops.aten.convolution(x, W[p.kernel].to(v.dtype), None, *p.map.arguments)
            u[:, p.rows] += y.flatten(1)
        return u.view(*v.shape[:-1], -1)

    def adjoint(self, W: Tensor, u: Float[Tensor, "*m u"]) -> Float[Tensor, "*m v"]:
        """The transpose of the convolution, applied to each row of ``u``, in its precision."""
        v = u.new_zeros(u[..., :1].numel(), self.inputs)
        for p in self._parts(W, whole=W.dtype == u.dtype):
            v[:, p.columns] += p.map._transposed(W[p.kernel].to(u.dtype), u[..., p.rows].reshape(len(v), -1))
        return v.view(*u.shape[:-1], -1)

    def round_trip(self, W: Tensor, v: Float[Tensor, "m v"]) -> tuple[Float[Tensor, "m u"], Float[Tensor, "m v"]]:
        """The convolution of each row of ``v``, and the transpose of that applied to it."""
        u = self.forward(W, v)
        return u, self.adjoint(W, u)

    def add_outer_(self, G: Tensor, u: Float[Tensor, "k u"], v: Float[Tensor, "k v"], alpha: float = 1.0) -> None:
        """G += alpha times the gradient of Σ⟨u, conv(v)⟩ by the kernel."""
        for p in self._parts(G):
            W = torch.empty_like(G[p.kernel], dtype=u.dtype)
            x = _bordered(v[:, p.columns].reshape(-1, *p.map.input_shape), self.border)
            G[p.kernel].add_(p.map._backward(u[:, p.rows], x, W, by=1), alpha=alpha)

    def scale_(self, W: Tensor, by: Float[Tensor, " 1"]) -> None:
        """Multiply the kernel by the number, in place."""
        W.mul_(by[0].to(W.dtype))

    def part(self, groups: slice, outputs: slice, inputs: slice) -> "Part":
        """The convolution of some input channels of each of these groups to some of its output channels.

        Of more than one group, all channels have to be taken.
        """
        count = self.arguments[-1]
        rows, output_shape = _channels(self.output_shape, count, groups, outputs)
        columns, input_shape = _channels(self.input_shape, count, groups, inputs)
        first = self.input_shape if self.arguments[3] else self.output_shape  # whose channels the kernel begins with
        kernel, _ = _channels(first[:1], count, groups, inputs if self.arguments[3] else outputs)
        arguments = (*self.arguments[:-1], groups.stop - groups.start)
        m = replace(self, input_shape=input_shape, output_shape=output_shape, arguments=arguments)
        return Part(kernel, rows, columns, m)

    def _parts(self, W: Tensor, whole: bool = False) -> Iterator["Part"]:
        """All of it if ``whole``, or about ``PIECE`` elements of the kernel each: some groups, or some channels."""
        count, most = self.arguments[-1], max(1, PIECE // W[0].numel())
        channels = W.shape[0] // count
        groups, some = (count, channels) if whole else (max(1, most // channels), min(channels, most))
        for g, c in product(range(0, count, groups), range(0, channels, some)):
            sides = slice(c, min(c + some, channels)), slice(0, W.shape[1])
            outputs, inputs = sides[::-1] if self.arguments[3] else sides
            yield self.part(slice(g, min(g + groups, count)), outputs, inputs)

    def matrices(self, W: Tensor) -> Float[Tensor, "1 outputs inputs"]:
        """The operator as a dense matrix, column by column: for small sizes only."""
        return self.forward(W, torch.eye(self.inputs, dtype=W.dtype, device=W.device)).t()[None]

    def squares(self, W: Tensor) -> Float[Tensor, " blocks"]:
        """Not known without the dense operator: NaN."""
        return W.new_full((1,), float("nan"), dtype=torch.float64)

    def _transposed(self, W: Tensor, u: Float[Tensor, "m u"]) -> Float[Tensor, "m v"]:
        if self.border is None:
            return self._backward(u, u.new_empty(len(u), *self.input_shape), W, by=0).flatten(1)
        with torch.enable_grad():
            x = u.new_zeros(len(u), *self.input_shape, requires_grad=True)
            framed = _bordered(x, self.border)
        inner = self._backward(u, framed.detach(), W, by=0)
        return torch.autograd.grad(framed, x, inner)[0].flatten(1)

    def _backward(self, u: Float[Tensor, "m u"], x: Tensor, W: Tensor, by: int) -> Tensor:
        """The gradient of Σ⟨u, conv(x)⟩ by the input (0) or by the kernel (1)."""
        images, mask = u.reshape(-1, *self.output_shape), [by == 0, by == 1, False]
        return torch.ops.aten.convolution_backward(images, x, W, None, *self.arguments, mask)[by]


class Part(NamedTuple):
    """A convolution of some channels to some: where its kernel, outputs and inputs lie, and its map."""

    kernel: slice
    rows: slice
    columns: slice
    map: OperatorMap


def _channels(shape: tuple[int, ...], count: int, groups: slice, part: slice) -> tuple[slice, tuple[int, ...]]:
    """Where ``part`` of the channels of ``groups``, of ``count``, lies in a flat image, and the shape of that part."""
    each, unit = shape[0] // count, prod(shape[1:])
    start, stop = groups.start * each + part.start, (groups.stop - 1) * each + part.stop
    return slice(start * unit, stop * unit), (stop - start, *shape[1:])


def _kernel_shape(module: _ConvNd) -> tuple[int, ...]:
    channels = (module.out_channels, module.in_channels)
    first, second = channels[::-1] if isinstance(module, _ConvTransposeNd) else channels
    return (first, second // module.groups, *module.kernel_size)


def padding_of(module: _ConvNd) -> tuple[int, ...]:
    """What is added before and after each dimension, the last first, as ``F.pad`` takes it.

    As the forward pass reads it: of zeros the attribute of the moment, which may have been set anew; of other modes the
    amounts that were noted when the layer was built.
    """
    if module.padding_mode != "zeros":
        return tuple(module._reversed_padding_repeated_twice)
    dimensions = len(module.kernel_size)
    if module.padding == "same":
        spans = [d * (k - 1) for k, d in zip(module.kernel_size, in_each(module.dilation, dimensions), strict=True)]
        each = [(span // 2, span - span // 2) for span in spans]
    else:
        each = [(n, n) for n in in_each(0 if module.padding == "valid" else module.padding, dimensions)]
    return tuple(n for pair in each[::-1] for n in pair)


def in_each(amount: Any, dimensions: int) -> tuple[int, ...]:
    """A stride, padding or dilation in each dimension, as torch takes a number or a sequence of one for all of them."""
    amounts = tuple(amount) if isinstance(amount, Sequence) else (amount,)
    return amounts * dimensions if len(amounts) == 1 else amounts


def _padding(module: _ConvNd) -> tuple[tuple[tuple[int, ...], str] | None, list[int]]:
    """What has to be padded before the convolution, and what the convolution pads itself."""
    amounts, none = padding_of(module), [0] * len(module.kernel_size)
    if module.padding_mode != "zeros":
        return (amounts, module.padding_mode), none
    if any(amounts[i] != amounts[i + 1] for i in range(0, len(amounts), 2)):
        return (amounts, "constant"), none
    return None, list(amounts[::2])[::-1]


def _bordered(x: Tensor, border: tuple[tuple[int, ...], str] | None) -> Tensor:
    return x if border is None else F.pad(x, border[0], mode=border[1])

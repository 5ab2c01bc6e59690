"""Layers as linear maps of a batch of inputs: a convolution by its weight, any other by its own forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectreg.maps.behaviour import close
from spectreg.maps.convolution import OperatorMap

Products = Callable[[Tensor], Tensor]
DENSE, ENTRIES = 512, 1 << 24  # rows or columns, and numbers, up to which a matrix is formed


@dataclass
class ConvolutionMap:
    """The convolution of ``A`` with the kernel W, on several flat inputs at once; its groups are blocks."""

    A: OperatorMap
    W: Tensor

    @property
    def blocks(self) -> int:
        return self.A.arguments[-1]

    @property
    def sides(self) -> tuple[int, int]:
        return self.A.inputs, self.A.outputs

    def forward(self, x: Float[Tensor, "k inputs"]) -> Float[Tensor, "k outputs"]:
        return self.A.forward(self.W, x)

    def adjoint(self, y: Float[Tensor, "k outputs"]) -> Float[Tensor, "k inputs"]:
        return self.A.adjoint(self.W, y)


class OwnMap:
    """What a layer does to inputs of ``shape`` in its own forward pass, but for a constant: its Jacobian at zero.

    Raises:
        ValueError: The layer fails on such inputs, is not linear but for a constant, or works in a precision in
            which that cannot be told.
    """

    blocks = 1

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        self.layer, self.shape, self.name = layer, tuple(shape), type(layer).__name__
        held = chain(layer.parameters(), layer.buffers())
        self.like = next((t for t in held if t.is_floating_point()), torch.zeros((), device="cpu"))
        if self.like.element_size() < 4:
            raise ValueError(
                f"{self.name} has a forward of its own, and its weights are {self.like.dtype}: measure "
                "copy.deepcopy(layer).float()."
            )
        self._graphs: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.sides = prod(shape), self.graph(1)[1].numel()
        self._require_linear()
        self._require_examples_apart()

    @cached_property
    def scale(self) -> float:
        """The size of an output of a random input, by which products are divided: else squares under- or overflow."""
        return self._pushed(self._gaussian(1)).abs().max().item() or 1.0

    def graph(self, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``k`` inputs (zeros), their outputs, cotangents (zeros) and the gradient by the input, linear in these."""
        if k not in self._graphs:
            with torch.enable_grad():
                x = self.like.new_zeros(k, *self.shape).requires_grad_()
                y = self._output(x)
                u = torch.zeros_like(y, requires_grad=True)
                (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
            self._graphs = {k: (x, y, u, pulled)}  # of one number of inputs, since each holds a pass in memory
        return self._graphs[k]

    def forward(self, x: Float[Tensor, "k inputs"]) -> Float[Tensor, "k outputs"]:
        return self._pushed(x) / self.scale

    def adjoint(self, y: Float[Tensor, "k outputs"]) -> Float[Tensor, "k inputs"]:
        return self._pulled(y) / self.scale

    def _pushed(self, x: Tensor) -> Tensor:
        _, y, u, pulled = self.graph(len(x))
        if not pulled.requires_grad:  # it does not depend on u: the layer is constant
            return torch.zeros_like(y).flatten(1)
        (product,) = torch.autograd.grad(pulled, u, x.view_as(pulled).to(pulled), retain_graph=True)
        return product.flatten(1)

    def _pulled(self, u: Tensor) -> Tensor:
        x, y, _, _ = self.graph(len(u))
        return torch.autograd.grad(y, x, u.view_as(y), retain_graph=True)[0].flatten(1)

    def _output(self, x: Tensor) -> Tensor:
        try:
            y = self.layer(x)
        except Exception as error:  # the layer's own code, which can raise anything
            raise ValueError(f"{self.name} fails on input_shape {self.shape}, without the batch: {error}") from error
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1] or not y.requires_grad:
            raise ValueError(
                f"{self.name} does not give one tensor that depends on its input in a differentiable way, an example "
                "a row: it has no operator norm here."
            )
        return y

    def _gaussian(self, k: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(k, prod(self.shape), generator=generator, dtype=torch.float64, device=generator.device).to(
            self.like
        )

    def _require_linear(self) -> None:
        """The outputs of random inputs and their opposites, and the gradients there, are those of the map.

        Opposites, since a half-space of inputs in which a unit is active, or not, holds all multiples of one.
        """
        v = self._gaussian(1)
        _, at_zero, _, _ = self.graph(1)
        u = torch.ones_like(at_zero)
        for size in (1.0, -1.0, 1e3, -1e3):
            with torch.enable_grad():
                x = (size * v).view(1, *self.shape).requires_grad_()
                y = self._output(x)
            (g,) = torch.autograd.grad(y, x, u)
            expected = at_zero.detach() + self._pushed(x.detach().flatten(1)).view_as(y)
            if not (close(y.detach(), expected) and close(g.flatten(1), self._pulled(u.flatten(1)))):
                raise ValueError(
                    f"{self.name} is not a linear map plus a constant, by its outputs and gradients at random inputs: "
                    "it has no operator norm. Use jacobian_norm or lipschitz_bound."
                )

    def _require_examples_apart(self) -> None:
        """An input's output is the same beside another one, since many are run at a time."""
        with torch.enable_grad():
            x = self._gaussian(2).view(2, *self.shape).requires_grad_()
            alone, beside = self._output(x[:1]), self._output(x)
        if not close(beside[:1].detach(), alone.detach()):
            raise ValueError(
                f"{self.name} gives an example another output beside others: it has no operator norm. Look for means, "
                "sums or norms over the first dimension, and for what changes from call to call."
            )


def dense(m: ConvolutionMap | OwnMap) -> Float[Tensor, "blocks outputs inputs"] | None:
    """The blocks of a map as matrices, or their transposes where these are shorter; None where that is too large."""
    inputs, outputs = (side // m.blocks for side in m.sides)
    short = min(inputs, outputs)
    if short > DENSE or short * m.blocks * (inputs + outputs) > ENTRIES:
        return None
    like = m.W if isinstance(m, ConvolutionMap) else m.like
    basis = torch.eye(short, dtype=like.dtype, device=like.device).repeat(1, m.blocks)  # in all blocks at once
    columns = (m.forward if inputs <= outputs else m.adjoint)(basis)
    return columns.reshape(short, m.blocks, -1).transpose(0, 1)

"""A weight as the linear map it is: one or more matrix blocks, seen in the weight's own memory."""

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.maps.base import Norm
from spectreg.maps.products import converted, fetching_is_slow, flat, is_whole, products, tile_on, tiles

CACHED = 1 << 17  # elements of a weight that stay in a processor's own cache from one product to the next
SMALL = 1 << 18  # elements of a weight that is read twice sooner than it is looked after


@dataclass(frozen=True)
class MatrixMap:
    """A weight cut into ``blocks`` equal matrices of ``outputs`` rows and ``inputs`` columns.

    As a rule the first dimension of the weight holds the rows of all blocks, one block after the other, and all other
    dimensions are columns (the paper's b × a·kw·kh for a convolution).

    Args:
        shape: Shape of the weight.
        blocks: Number of matrices: groups of a convolution, gates of an LSTM, heads of an attention.
        norm: ``"max"``: the blocks lie on the diagonal of one map, whose norm is the largest of theirs.
            ``"each"``: every block is a map of its own and is penalized by itself.
        layout: How the weight is stored. ``"rows"``: as above. ``"columns"``: inputs first, two dimensions, as
            the ``Conv1D`` of transformers has it. ``"transposed"``: a transposed convolution, (inputs, outputs of one
            group, kernel…). ``"stack"``: one matrix after the other, (blocks, outputs, inputs…).

    >>> MatrixMap((6, 4, 3, 3), blocks=2).matrices(torch.zeros(6, 4, 3, 3)).shape
    torch.Size([2, 3, 36])
    >>> MatrixMap((6, 4, 3, 3), blocks=2, layout="transposed").matrices(torch.zeros(6, 4, 3, 3)).shape
    torch.Size([2, 4, 27])
    """

    shape: tuple[int, ...]
    blocks: int = 1
    norm: Norm = "max"
    layout: Literal["rows", "columns", "transposed", "stack"] = "rows"

    @property
    def outputs(self) -> int:
        """Rows of one block."""
        if self.layout in ("transposed", "stack"):
            return self.shape[1]
        return self.shape[self.layout == "columns"] // self.blocks

    @property
    def inputs(self) -> int:
        """Columns of one block."""
        return self._parts * self._columns

    @property
    def _parts(self) -> int:
        """A transposed convolution's block is the sum over its inputs of a matrix each: outputs × kernel."""
        return self.shape[0] // self.blocks if self.layout == "transposed" else 1

    @property
    def _columns(self) -> int:
        if self.layout == "columns":
            return self.shape[0]
        return prod(self.shape[1:] if self.layout == "rows" else self.shape[2:])

    def matrices(self, W: Tensor) -> Float[Tensor, "blocks outputs inputs"]:
        """The blocks of ``W``: a view of its memory where the strides allow, a copy for a transposed convolution."""
        if self.layout == "transposed":
            parts = W.reshape(self.blocks, self._parts, self.outputs, self._columns)
            return parts.transpose(1, 2).reshape(self.blocks, self.outputs, self.inputs)
        if self.layout == "stack":
            return W.flatten(2)
        stored = W.t() if self.layout == "columns" else W.flatten(1)
        return stored.unflatten(0, (self.blocks, self.outputs))

    def squares(self, W: Tensor) -> Float[Tensor, " blocks"]:
        """‖W‖_F² of each block, in float64."""
        parts = self._stored(W)
        norms = torch.linalg.vector_norm(parts, dim=(2, 3), dtype=torch.promote_types(W.dtype, torch.float32))
        return norms.double().square().sum(1)

    def forward(self, W: Tensor, v: Float[Tensor, " v"], k: int = 1) -> Float[Tensor, " u"]:
        """Wv, in the precision of ``v``."""
        W = converted(W, v, tile_on(W.device))
        if self._is_plain(W, v, k):
            return torch.mv(self._plain(W), self._to_memory(W, v))
        W4, v4 = self._stored(W), self._inputs_as_stored(W, v, k)
        if is_whole(W4, v):
            return products(W4, v4).flatten()
        u = v.new_zeros(self.blocks, self.outputs, k)
        for b, p, r in tiles(W4, v):
            u[b, r] += products(W4[b, p, r].to(v.dtype), v4[b, p]).sum(1)
        return u.flatten()

    def adjoint(self, W: Tensor, u: Float[Tensor, " u"], k: int = 1) -> Float[Tensor, " v"]:
        """Wᵀu, in the precision of ``u``."""
        W = converted(W, u, tile_on(W.device))
        if self._is_plain(W, u, k):
            return self._from_memory(W, torch.mv(self._plain(W).t(), u))
        W4, u4 = self._stored(W), u.view(self.blocks, 1, self.outputs, k)
        if is_whole(W4, u):
            v4 = products(W4.mT, u4)
        else:
            v4 = u.new_zeros(self.blocks, self._parts, self._columns, k)
            for b, p, r in tiles(W4, u):
                v4[b, p] += products(W4[b, p, r].to(u.dtype).mT, u4[b, :, r])
        if self._kernel_first(W):
            return v4.view(self.blocks, -1, self.shape[1], k).transpose(1, 2).flatten()
        return v4.flatten()

    def round_trip(self, W: Tensor, v: Float[Tensor, " v"], u: Float[Tensor, " u"], w: Float[Tensor, " v"]) -> None:
        """Write Wv to ``u`` and Wᵀu to ``w``; on a CPU in one pass over a ``W`` that is not small."""
        W = converted(W, v, tile_on(W.device))
        large = W.device.type == "cpu" and W.numel() >= SMALL
        if large and self.blocks == 1 and self.layout == "rows" and (W.is_contiguous() or self._kernel_first(W)):
            self._in_one_pass(W, v, u, w)
        elif W.ndim == 2 and self._is_plain(W, v, 1):
            A = self._plain(W)
            torch.mv(A, v, out=u)
            torch.mv(A.t(), u, out=w)
        else:
            u.copy_(self.forward(W, v))
            w.copy_(self.adjoint(W, u))

    def _in_one_pass(self, W: Tensor, v: Tensor, u: Tensor, w: Tensor) -> None:
        """Some rows after the others, both products while they are in the cache."""
        A, x, rows = self._plain(W), self._to_memory(W, v), max(1, CACHED // self.inputs)
        y = w.zero_() if x is v else torch.zeros_like(x)
        touch = not torch.compiler.is_compiling() and fetching_is_slow()
        for some, across, of_u in zip(A.split(rows), A.t().split(rows, 1), u.split(rows), strict=True):
            if W.dtype != v.dtype:
                some = some.to(v.dtype)
                across = some.t()
            elif touch:
                some.sum()
            torch.mv(some, x, out=of_u)
            y.addmv_(across, of_u)
        if y is not w:
            w.copy_(self._from_memory(W, y))

    def add_outer_(
        self, G: Tensor, u: Float[Tensor, " u"], v: Float[Tensor, " v"], k: int = 1, alpha: float = 1.0
    ) -> None:
        """G += alpha·uvᵀ, rounded once to the precision of ``G``."""
        if self._is_plain(G, u, k):
            self._plain(G).addcmul_(u[:, None], self._to_memory(G, v), value=alpha)  # a quarter faster than addr_
        elif not (G.is_contiguous() or G.ndim == 2 or self._kernel_first(G)):
            dense = torch.zeros(self.shape, dtype=u.dtype, device=u.device)
            self.add_outer_(dense, u, v, k)
            G.add_(dense, alpha=alpha)
        else:
            G4, u4, v4 = self._stored(G), u.view(self.blocks, 1, self.outputs, k), self._inputs_as_stored(G, v, k)
            for b, p, r in tiles(G4, u):
                tile, left, right = G4[b, p, r], u4[b, :, r], v4[b, p].mT
                if G.dtype == u.dtype and k == 1:
                    tile.addcmul_(left, right, value=alpha)
                elif G.dtype == u.dtype:
                    flat(tile).baddbmm_(flat(left.expand(*tile.shape[:3], k)), flat(right), alpha=alpha)
                else:
                    tile.add_(left * right if k == 1 else left @ right, alpha=alpha)

    def _is_plain(self, W: Tensor, x: Tensor, k: int) -> bool:
        """Whether one BLAS call on a matrix does it."""
        one = k == 1 and self.blocks == 1 and self.layout in ("rows", "columns") and W.dtype == x.dtype
        return one and (W.ndim == 2 or W.is_contiguous() or self._kernel_first(W))

    def _plain(self, W: Tensor) -> Float[Tensor, "outputs inputs"]:
        if self.layout == "columns":
            return W.t()
        if W.ndim == 2:
            return W
        return (W if W.is_contiguous() else W.movedim(1, -1)).view(self.shape[0], -1)

    def _to_memory(self, W: Tensor, v: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        """The inputs of a plain matrix, in the order in which its columns lie in memory."""
        return v if W.ndim == 2 or W.is_contiguous() else v.view(self.shape[1], -1).t().reshape(-1)

    def _from_memory(self, W: Tensor, v: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
        return v if W.ndim == 2 or W.is_contiguous() else v.view(-1, self.shape[1]).t().reshape(-1)

    def _kernel_first(self, W: Tensor) -> bool:
        """Whether ``W`` is a kernel in the channels-last memory format, whose columns are kw·kh·a in memory."""
        return self.layout == "rows" and not W.is_contiguous() and W.ndim > 2 and W.movedim(1, -1).is_contiguous()

    def _stored(self, W: Tensor) -> Float[Tensor, "blocks parts outputs columns"]:
        """The blocks and their parts, in memory order; a view unless the strides are odd."""
        if self.layout == "transposed":
            return W.flatten(2).unflatten(0, (self.blocks, self._parts))
        if self.layout == "columns":
            return W.t().unflatten(0, (self.blocks, 1, self.outputs))
        if self.layout == "stack":
            return W.flatten(2).unsqueeze(1)
        stored = W.movedim(1, -1) if self._kernel_first(W) else W
        return stored.reshape(self.blocks, 1, self.outputs, -1)

    def _inputs_as_stored(self, W: Tensor, v: Tensor, k: int) -> Float[Tensor, "blocks parts columns k"]:
        if self._kernel_first(W):
            v = v.view(self.blocks, self.shape[1], -1, k).transpose(1, 2).reshape(-1)
        return v.view(self.blocks, self._parts, self._columns, k)

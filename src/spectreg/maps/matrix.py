"""A weight as the linear map it is: one or more matrix blocks, seen in the weight's own memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.maps.base import Norm

# On a CPU: elements that stay in the cache from one product to the next; elements above which several threads share a
# product with one vector; elements of which torch takes no more threads than one; elements of a block above which it is
# multiplied by itself. Conversions of more than ``ALONE`` elements fork: thousands of joins, each of which waits for a
# core where other processes are busy, took 8 to 80 × the time of a product in bfloat16.
TILE, SHARED, ALONE, SINGLE = 1 << 20, 1 << 19, 1 << 15, 1 << 12
PIECE_ELSEWHERE = 1 << 22  # elements converted at a time on an accelerator, where each piece costs launches


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
        S = self._stored(W)
        wide = torch.float32 if W.device.type == "mps" else torch.float64  # float32 has no squares of 1e20 and 1e-30
        squares = S.new_zeros(self.blocks, dtype=wide)
        for b, p, r in pieces(S, whole=False):
            squares[b] += torch.linalg.vector_norm(S[b, p, r], dim=(1, 2, 3), dtype=wide).square()
        return squares

    def scale_(self, W: Tensor, by: Float[Tensor, " some"]) -> None:
        """Multiply each block by its number, or all by one, in place."""
        by = by.to(W.dtype)
        if len(by) == 1:
            W.mul_(by[0])
        elif self.layout == "columns":
            W.unflatten(1, (len(by), -1)).mul_(by[:, None])
        else:
            parts = W.unflatten(0, (len(by), -1))
            parts.mul_(by.view(-1, *[1] * (parts.ndim - 1)))

    def forward(self, W: Tensor, v: Float[Tensor, "*m v"]) -> Float[Tensor, "*m u"]:
        """Wv of each row of ``v``, in its precision."""
        if v.ndim == 1:
            return self.forward(W, v[None])[0]
        v, A = self._to_memory(W, v), self._matrix(W)
        if A is not None:
            return times(v, A.t())
        S, x = self._stored(W), v.view(len(v), self.blocks, self._parts, self._columns)
        u = v.new_zeros(len(v), self.blocks, self.outputs)
        for b, p, r in pieces(S, whole=W.dtype == v.dtype and self._parts == 1):
            u[:, b, r] += times_each(x[:, b, p].flatten(2), _dense(S[b, p, r], v.dtype).mT)
        return u.flatten(1)

    def adjoint(self, W: Tensor, u: Float[Tensor, "*m u"]) -> Float[Tensor, "*m v"]:
        """Wᵀu of each row of ``u``, in its precision."""
        if u.ndim == 1:
            return self.adjoint(W, u[None])[0]
        A = self._matrix(W)
        if A is not None:
            return self._from_memory(W, times(u, A))
        S, x = self._stored(W), u.view(len(u), self.blocks, self.outputs)
        v = u.new_zeros(len(u), self.blocks, self._parts, self._columns)
        for b, p, r in pieces(S, whole=W.dtype == u.dtype and self._parts == 1):
            part = times_each(x[:, b, r], _dense(S[b, p, r], u.dtype))
            v[:, b, p] += part.unflatten(2, (-1, self._columns))
        return self._from_memory(W, v.flatten(1))

    def round_trip(self, W: Tensor, v: Float[Tensor, "m v"]) -> tuple[Float[Tensor, "m u"], Float[Tensor, "m v"]]:
        """Wv and Wᵀ(Wv) of each row of ``v``, in its precision; a CPU reads ``W`` from memory once for both."""
        A = self._matrix(W)
        if A is not None and A.stride(1) == 1:
            u, w = there_and_back(self._to_memory(W, v), A)
            return u, self._from_memory(W, w)
        S = self._stored(W)
        if A is not None or self._parts > 1 or S.stride(3) != 1 or self.outputs * self._columns <= SINGLE:
            u = self.forward(W, v)
            return u, self.adjoint(W, u)
        x = self._to_memory(W, v).view(len(v), self.blocks, self._columns)
        u, w = (torch.cat(x, 1) for x in zip(*[there_and_back(x[:, b], S[b, 0]) for b in range(len(S))], strict=True))
        return u, self._from_memory(W, w)

    def add_outer_(self, G: Tensor, u: Float[Tensor, "k u"], v: Float[Tensor, "k v"], alpha: float = 1.0) -> None:
        """G += alpha·Σ uvᵀ over the rows, rounded once to the precision of ``G``."""
        in_place = G.is_contiguous() or G.ndim == 2 or self._kernel_first(G) or (self.layout == "stack" and G.ndim == 3)
        if not in_place:
            dense = torch.zeros(self.shape, dtype=u.dtype, device=u.device)
            self.add_outer_(dense, u, v)
            G.add_(dense, alpha=alpha)
            return
        v, A = self._to_memory(G, v), self._matrix(G)
        if A is not None:
            add_times_(A, u.t(), v, alpha)
        else:
            self._add_pieces(G, u, v, alpha)

    def _add_pieces(self, G: Tensor, u: Tensor, v: Tensor, alpha: float) -> None:
        S, k, fused = self._stored(G), len(u), G.dtype == u.dtype and len(u) == 1
        left = u.view(k, self.blocks, 1, self.outputs).movedim(0, 3)
        right = v.view(k, self.blocks, self._parts, self._columns).movedim(0, 2)
        for b, p, r in pieces(S, whole=fused):
            if fused:
                S[b, p, r].addcmul_(left[b, :, r], right[b, p], value=alpha)
            else:
                S[b, p, r].add_(left[b, :, r] @ right[b, p], alpha=alpha)

    def _matrix(self, W: Tensor) -> Float[Tensor, "outputs inputs"] | None:
        """The map as one matrix in the weight's own memory, if it is one."""
        if self.blocks > 1 or self.layout in ("transposed", "stack"):
            return None
        if self.layout == "columns":
            return W.t()
        if W.ndim == 2:
            return W
        if W.is_contiguous():
            return W.flatten(1)
        return W.movedim(1, -1).flatten(1) if self._kernel_first(W) else None

    def _kernel_first(self, W: Tensor) -> bool:
        """Whether ``W`` is a kernel in the channels-last memory format, whose columns are kw·kh·a in memory."""
        return self.layout == "rows" and W.ndim > 2 and not W.is_contiguous() and W.movedim(1, -1).is_contiguous()

    def _to_memory(self, W: Tensor, v: Float[Tensor, "m v"]) -> Float[Tensor, "m v"]:
        """The inputs in the order in which the columns lie in memory."""
        if not self._kernel_first(W):
            return v
        return v.view(len(v), self.blocks, self.shape[1], -1).transpose(2, 3).reshape(len(v), -1)

    def _from_memory(self, W: Tensor, v: Float[Tensor, "m v"]) -> Float[Tensor, "m v"]:
        if not self._kernel_first(W):
            return v
        return v.view(len(v), self.blocks, -1, self.shape[1]).transpose(2, 3).reshape(len(v), -1)

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


def times(x: Float[Tensor, "m n"], A: Float[Tensor, "n o"]) -> Float[Tensor, "m o"]:
    """x·A for few rows ``x``, in their precision, at the price of reading ``A`` once.

    A CPU copies a large ``A`` before it multiplies it with few rows, and takes one thread alone for one row.
    Products with parts of ``A`` take less time: on one thread row by row, on several as one batch, which forks once.
    """
    if is_shared(x, A):
        return with_rows(x, A.t()) if A.stride(0) == 1 else with_columns(x, A)
    if at_once(A, x, ALONE if len(x) > 1 else A.numel()):
        A = A.to(x.dtype)
        return torch.mv(A.t(), x[0])[None] if len(x) == 1 else x @ A
    y = x.new_zeros(len(x), A.shape[1])
    if A.stride(0) == 1:  # the transpose of a matrix of rows: each part gives some of the outputs
        for some, part in swept(A.t(), x.dtype):
            add_products_(y[:, some], part, x)
    else:
        for some, part in swept(A, x.dtype):
            add_products_(y, part.t(), x[:, some])
    return y


def there_and_back(x: Float[Tensor, "m i"], A: Float[Tensor, "o i"]) -> tuple[Tensor, Tensor]:
    """Ax and AᵀAx for few rows ``x``: the second product of a part of ``A`` finds it in the cache.

    One row stays on one thread: shared, a step takes less on a quiet machine, but more beside busy processes
    (docs/benchmarks.md).
    """
    m = x.shape[0]  # len() of a tensor takes as long as a small product
    if m > 1 and is_shared(x, A):
        y = with_rows(x, A)
        return y, with_columns(y, A)
    if at_once(A, x, ALONE if m > 1 else TILE):
        A = A.to(x.dtype)
        y = torch.mv(A, x.squeeze(0)) if m == 1 else x @ A.t()
        z = torch.mv(A.t(), y) if m == 1 else y @ A
        return y.view(m, -1), z.view(m, -1)
    y, z = x.new_zeros(len(x), len(A)), torch.zeros_like(x)
    for some, part in swept(A, x.dtype):
        add_products_(y[:, some], part, x)
        add_products_(z, part.t(), y[:, some])
    return y, z


def is_shared(x: Tensor, A: Tensor) -> bool:
    """Whether several threads are to share a product, as a batch of products with parts of ``A``."""
    if A.numel() <= ALONE or A.device.type != "cpu" or A.dtype != x.dtype or torch.compiler.is_compiling():
        return False
    return torch.get_num_threads() > 1 and A.numel() > (ALONE if x.shape[0] > 1 else SHARED)


def with_rows(x: Float[Tensor, "m i"], A: Float[Tensor, "o i"]) -> Float[Tensor, "m o"]:
    """xAᵀ for few rows ``x``, as one batch of products that all threads share."""
    parts, rest = in_parts(A, len(x))
    y = torch.bmm(x.expand(len(parts), -1, -1), parts.mT).transpose(0, 1).flatten(1)
    return torch.cat([y, x @ rest.t()], 1) if len(rest) else y


def with_columns(x: Float[Tensor, "m o"], A: Float[Tensor, "o i"]) -> Float[Tensor, "m i"]:
    """xA for few rows ``x``, as one batch of products that all threads share."""
    parts, rest = in_parts(A, len(x))
    along, last = x.split([len(A) - len(rest), len(rest)], 1)
    y = torch.bmm(along.unflatten(1, (len(parts), -1)).transpose(0, 1), parts).sum(0)
    return y + last @ rest if len(rest) else y


def in_parts(A: Float[Tensor, "o i"], m: int) -> tuple[Float[Tensor, "parts some i"], Float[Tensor, "rest i"]]:
    """Two parts a thread of equally many rows, at least 4m each, and the rows that are left."""
    parts = max(1, min(2 * torch.get_num_threads(), len(A) // (4 * m)))
    rows = len(A) // parts * parts
    return A[:rows].unflatten(0, (parts, -1)), A[rows:]


def add_products_(y: Float[Tensor, "m o"], A: Float[Tensor, "o i"], x: Float[Tensor, "m i"]) -> None:
    """y += Ax, row by row of ``x``: for a part of a matrix, in the cache."""
    for out, row in zip(y, x, strict=True):
        out.addmv_(A, row)


def add_times_(A: Float[Tensor, "n o"], x: Float[Tensor, "n k"], y: Float[Tensor, "k o"], alpha: float) -> None:
    """A += alpha·xy, rounded once to the precision of ``A``."""
    if A.dtype.itemsize > x.dtype.itemsize:
        x, y = x.to(A.dtype), y.to(A.dtype)
    if A.dtype == x.dtype and y.shape[0] == 1:
        A.addcmul_(x, y, value=alpha)  # a quarter faster than addr_
    elif A.dtype == x.dtype:
        A.addmm_(x, y, alpha=alpha)
    elif A.stride(0) == 1 and A.stride(1) != 1:
        add_times_(A.t(), y.t(), x.t(), alpha)
    else:
        few = max(1, converted_at_once(A) // max(1, A.shape[1]))
        for some, part in swept(A, x.dtype):
            parts = part.split(few)
            for left, right in zip(x[some].unbind(1), y, strict=True):
                torch._foreach_addcmul_(parts, left[:, None].split(few), [right] * len(parts), alpha)
            torch._foreach_copy_(A[some].split(few), parts)


def at_once(A: Tensor, x: Tensor, cached: int) -> bool:
    """Whether products of ``A`` with ``x`` are to be taken whole: where it has not more than ``cached`` elements."""
    if torch.compiler.is_compiling():
        return True
    if A.device.type != "cpu":
        return A.dtype == x.dtype or A.numel() <= PIECE_ELSEWHERE
    return A.numel() <= (cached if A.dtype == x.dtype else ALONE)


def swept(A: Float[Tensor, "n o"], dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "some o"]]]:
    """The rows of ``A`` in this precision, some at a time; those that are converted lie in the same memory in turn."""
    rows, few = (max(1, most // max(1, A.shape[1])) for most in (in_cache(A, dtype), converted_at_once(A)))
    held = None if A.dtype == dtype else A.new_empty((min(rows, len(A)), A.shape[1]), dtype=dtype)
    for first in range(0, len(A), rows):
        some = slice(first, first + rows)
        part = A[some]
        if held is not None:
            stored, part = part, held[: len(part)]
            torch._foreach_copy_(part.split(few), stored.split(few))
        yield some, part


def in_cache(A: Tensor, dtype: torch.dtype | None) -> int:
    """Elements to multiply at a time; if they are a copy, an eighth of the weight at most."""
    if A.device.type != "cpu":
        return PIECE_ELSEWHERE
    return TILE if A.dtype == dtype else min(TILE, max(ALONE, A.numel() // 8))


def converted_at_once(A: Tensor) -> int:
    """Elements of a weight of lower precision to convert in one call."""
    if torch.compiler.is_compiling():
        return max(1, A.numel())
    alone = A.device.type == "cpu" and torch.get_num_threads() > 1
    return ALONE if alone else in_cache(A, None)


def times_each(x: Float[Tensor, "m blocks n"], A: Float[Tensor, "blocks n o"]) -> Float[Tensor, "m blocks o"]:
    """x·A, block by block."""
    if len(A) == 1:
        return times(x[:, 0], A[0])[:, None]
    return torch.bmm(x.transpose(0, 1), A).transpose(0, 1)


def pieces(S: Float[Tensor, "blocks parts outputs columns"], whole: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Cut blocks, parts and rows for one product each, and so that a copy of a piece is small unless ``whole``.

    A CPU multiplies large blocks faster one at a time.

    >>> W = torch.empty(1, 1, 4096, 4096, dtype=torch.bfloat16, device="meta")
    >>> len(list(pieces(W, whole=False)))
    4
    """
    blocks, parts, rows, columns = S.shape
    of_block, most = parts * rows * columns, converted_at_once(S)
    apart = S.device.type == "cpu" and of_block > SINGLE
    b = 1 if apart else max(1, (blocks * of_block if whole else most) // max(1, of_block))
    p = parts if whole else max(1, min(parts, most // max(1, rows * columns)))
    r = rows if whole else max(1, min(rows, most // max(1, columns)))
    for i, j, k in product(range(0, blocks, b), range(0, parts, p), range(0, rows, r)):
        yield slice(i, i + b), slice(j, j + p), slice(k, k + r)


def _dense(piece: Float[Tensor, "blocks parts rows columns"], dtype: torch.dtype) -> Float[Tensor, "blocks rows _"]:
    """A piece as matrices in this precision."""
    return piece.to(dtype).transpose(1, 2).flatten(2)

"""Products with a stack of matrices, and how to cut it so that what is made of it for a while stays small."""

from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

TILE = 1 << 16  # elements of a weight of lower precision that are held in float32 at a time, on a CPU
TILE_ELSEWHERE = 1 << 22  # on an accelerator, where each piece costs a dozen launches
WORTH_A_CALL = 1 << 12  # elements of a block whose product takes longer than to call it by itself


@cache
def fetching_is_slow() -> bool:
    """Whether a matrix is multiplied with sooner if it is read in order before: so with MKL on a processor of AMD."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch have none
    return capabilities is not None and "AMD" in capabilities().get("cpu_name", "")


def converted(W: Tensor, x: Tensor, most: int) -> Tensor:
    """``W`` in the precision of ``x``, if it has at most so many elements."""
    return W if W.dtype == x.dtype or W.numel() > most else W.to(x.dtype)


def tile_on(device: torch.device) -> int:
    """Elements of a piece."""
    return TILE if device.type == "cpu" else TILE_ELSEWHERE


def products(A: Float[Tensor, "blocks parts rows columns"], x: Float[Tensor, "blocks _ columns k"]) -> Tensor:
    """A·x slice by slice; for single columns on a CPU by ``mv``, which reads a matrix six to twenty times faster."""
    A3, x3 = flat(A), flat(x.expand(*A.shape[:2], *x.shape[2:]))
    if x.shape[3] > 1 or A.device.type != "cpu" or len(A3) == 0 or A.shape[2] * A.shape[3] < WORTH_A_CALL:
        y = torch.bmm(A3, x3)
    else:
        y = torch.stack([torch.mv(M, column) for M, column in zip(A3, x3.squeeze(2), strict=True)])
    return y.view(*A.shape[:3], x.shape[3])


def flat(x: Float[Tensor, "blocks parts rows columns"]) -> Float[Tensor, "slices rows columns"]:
    """Of an ``x`` of several blocks, all parts; a view then, but for vectors that are the same for all parts."""
    return x.flatten(0, 1)


def is_whole(W4: Float[Tensor, "blocks parts rows columns"], x: Tensor) -> bool:
    """Whether nothing is made of ``W4`` in passing that would have to be cut."""
    return W4.dtype == x.dtype and W4.shape[1] == 1


def tiles(W4: Float[Tensor, "blocks parts rows columns"], x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cut blocks, parts and rows so that what a product makes of them for a while is small.

    That is a piece converted to the precision of ``x``, and the products of all parts.

    >>> W, x = torch.empty(1, 1, 4096, 4096, dtype=torch.bfloat16), torch.empty(())
    >>> len(list(tiles(W, x))), len(list(tiles(W.to("meta"), x.to("meta"))))
    (256, 4)
    """
    blocks, parts, rows, columns = W4.shape
    if is_whole(W4, x):
        yield slice(None), slice(None), slice(None)
        return
    most, a_row = tile_on(W4.device), 1 if W4.dtype == x.dtype else max(1, columns)
    for b, p in runs(blocks, parts, max(1, most // max(1, rows * a_row))):
        r = max(1, most // ((b.stop - b.start) * (p.stop - p.start) * a_row))
        for i in range(0, rows, r):
            yield b, p, slice(i, i + r)


def runs(blocks: int, parts: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Cut blocks of equally many parts into pieces of at most so many parts: some blocks, or some parts of one."""
    together, step = max(1, most // max(1, parts)), max(1, min(most, parts))
    for block in range(0, blocks, together):
        for part in range(0, parts, step):
            yield slice(block, min(block + together, blocks)), slice(part, min(part + step, parts))

"""Some heads of a projection of queries, keys or values, wherever they lie in its weight."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.maps.base import Norm
from spectreg.maps.matrix import MatrixMap


@dataclass(frozen=True)
class HeadsMap:
    """Some heads of a projection, each ``width`` of its outputs: blocks apart, in the order of ``slots``.

    Args:
        shape: Of the weight: outputs × inputs, or inputs × outputs if ``columns``.
        width: Outputs of a head.
        slots: Which of the heads that the outputs are cut into.
        columns: Whether it is stored as the ``Conv1D`` of transformers is.

    >>> HeadsMap((6, 5), width=2, slots=(0, 2)).forward(torch.ones(6, 5), torch.ones(1, 10))
    tensor([[5., 5., 5., 5.]])
    """

    shape: tuple[int, ...]
    width: int
    slots: tuple[int, ...]
    columns: bool = False
    norm: Norm = "each"

    @property
    def blocks(self) -> int:
        """How many heads."""
        return len(self.slots)

    @property
    def outputs(self) -> int:
        """Of each."""
        return self.width

    @property
    def inputs(self) -> int:
        """Of the projection."""
        return self.shape[0 if self.columns else 1]

    def forward(self, W: Tensor, v: Float[Tensor, "m v"]) -> Float[Tensor, "m u"]:
        """Of each head the product with its vectors."""
        parts = v.split([len(run) * self.inputs for run in self._runs()], 1)
        return torch.cat([m.forward(S, x) for (S, m), x in zip(self._stacks(W), parts, strict=True)], 1)

    def adjoint(self, W: Tensor, u: Float[Tensor, "m u"]) -> Float[Tensor, "m v"]:
        """Of each head the product of its transpose."""
        parts = u.split([len(run) * self.width for run in self._runs()], 1)
        return torch.cat([m.adjoint(S, x) for (S, m), x in zip(self._stacks(W), parts, strict=True)], 1)

    def round_trip(self, W: Tensor, v: Float[Tensor, "m v"]) -> tuple[Float[Tensor, "m u"], Float[Tensor, "m v"]]:
        """Both, one after the other."""
        u = self.forward(W, v)
        return u, self.adjoint(W, u)

    def add_outer_(self, G: Tensor, u: Float[Tensor, "k u"], v: Float[Tensor, "k v"], alpha: float = 1.0) -> None:
        """G += alpha·Σ uvᵀ, head by head, in place."""
        sizes = [len(run) for run in self._runs()]
        us, vs = (x.split([n * each for n in sizes], 1) for x, each in ((u, self.width), (v, self.inputs)))
        for (S, m), left, right in zip(self._stacks(G), us, vs, strict=True):
            m.add_outer_(S, left, right, alpha)

    def scale_(self, W: Tensor, by: Float[Tensor, " blocks"]) -> None:
        """Multiply each head by its number, in place."""
        for (S, m), some in zip(self._stacks(W), by.split([len(run) for run in self._runs()]), strict=True):
            m.scale_(S, some)

    def matrices(self, W: Tensor) -> Float[Tensor, "blocks outputs inputs"]:
        """The heads."""
        return torch.cat([S for S, _ in self._stacks(W)])

    def squares(self, W: Tensor) -> Float[Tensor, " blocks"]:
        """‖W‖_F² of each head."""
        return torch.cat([m.squares(S) for S, m in self._stacks(W)])

    def _stacks(self, W: Tensor) -> Iterator[tuple[Float[Tensor, "heads width inputs"], MatrixMap]]:
        """Views of the weight's own memory, each of heads at equal distances."""
        heads = (W.t() if self.columns else W).unflatten(0, (-1, self.width))
        for run in self._runs():
            S = heads[run.start : run.stop : run.step]
            yield S, MatrixMap(tuple(S.shape), len(run), norm="each", layout="stack")

    def _runs(self) -> list[range]:
        """The slots, cut where their distance changes: as a rule one run, or one a key that lies among its queries."""
        runs: list[range] = []
        begin = 0
        while begin < len(self.slots):
            rest = self.slots[begin:]
            step = rest[1] - rest[0] if len(rest) > 1 and rest[1] > rest[0] else 1
            count = next((i for i, slot in enumerate(rest) if slot != rest[0] + i * step), len(rest))
            runs.append(range(rest[0], rest[0] + (count - 1) * step + 1, step))
            begin += count
        return runs

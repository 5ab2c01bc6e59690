"""Products of weights as one linear map: power iteration goes through the factors, and no product is formed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.maps.base import LinearMap, Norm
from spectreg.maps.factors import Factors, Update

Rows = Float[Tensor, "m _"]


@dataclass(frozen=True)
class Factor:
    """One map of a product.

    Args:
        index: Which of the tensors it multiplies with.
        map: How.
        turned: Whether its transpose acts.
        shared: How many blocks of the product, one after the other, each of its blocks acts in: the queries of a key.
        share: Which power of a scaling of the product goes to it; those of a chain sum to one.
    """

    index: int
    map: LinearMap
    turned: bool = False
    shared: int = 1
    share: float = 0.0

    def apply(self, W: Factors, x: Rows, back: bool = False) -> Rows:
        """What it, or its transpose if ``back``, makes of the vectors that come to it."""
        by = self.map.adjoint if self.turned != back else self.map.forward
        return self.apart(by(W[self.index], self.together(x)))

    def together(self, x: Float[Tensor, "m _"]) -> Float[Tensor, "_ _"]:
        """The vectors of blocks that share one of its own as so many rows for that."""
        if self.shared == 1:
            return x
        return x.unflatten(1, (self.map.blocks, self.shared, -1)).movedim(2, 1).flatten(2).flatten(0, 1)

    def apart(self, x: Float[Tensor, "_ _"]) -> Float[Tensor, "m _"]:
        """The way back from ``together``."""
        if self.shared == 1:
            return x
        return x.unflatten(0, (-1, self.shared)).unflatten(2, (self.map.blocks, -1)).movedim(1, 2).flatten(1)


Chain = tuple[Factor, ...]


@dataclass(frozen=True)
class ProductMap:
    """A sum of products of weights, block by block: of each of ``chains`` the first factor acts first.

    >>> from spectreg.maps.matrix import MatrixMap
    >>> A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]])
    >>> BA = ProductMap(((Factor(0, MatrixMap((1, 2))), Factor(1, MatrixMap((2, 1)))),), 2, 2)
    >>> BA.matrices(Factors([A, B]))
    tensor([[[6., 8.],
             [0., 0.]]])
    """

    chains: tuple[Chain, ...]
    outputs: int
    inputs: int
    blocks: int = 1
    norm: Norm = "max"

    def forward(self, W: Factors, v: Float[Tensor, "*m v"]) -> Float[Tensor, "*m u"]:
        """The product with each row of ``v``."""
        rows = v.reshape(-1, v.shape[-1])
        u = sum(passes(W, chain, rows)[-1] for chain in self.chains)
        assert isinstance(u, Tensor)
        return u.view(*v.shape[:-1], -1)

    def adjoint(self, W: Factors, u: Float[Tensor, "*m u"]) -> Float[Tensor, "*m v"]:
        """The transpose, factor by factor."""
        rows = u.reshape(-1, u.shape[-1])
        v = sum(passes_back(W, chain, rows)[0] for chain in self.chains)
        assert isinstance(v, Tensor)
        return v.view(*u.shape[:-1], -1)

    def round_trip(self, W: Factors, v: Float[Tensor, "*m v"]) -> tuple[Float[Tensor, "*m u"], Float[Tensor, "*m v"]]:
        """Both, one after the other."""
        u = self.forward(W, v)
        return u, self.adjoint(W, u)

    def add_outer_(self, G: Update, u: Float[Tensor, "k u"], v: Float[Tensor, "k v"], alpha: float = 1.0) -> None:
        """Add the gradient of Σ uᵀ(product)v by each factor into its tensor of ``G``, all of the factors as they are.

        Of B·A it is uᵀ(BA)v = (Bᵀu)ᵀAv = uᵀB(Av): an outer product each.
        """
        updates = []
        for chain in self.chains:
            before, after = passes(G.factors, chain, v), passes_back(G.factors, chain, u)
            updates += [
                (factor, before[i], after[i + 1]) for i, factor in enumerate(chain) if G.into[factor.index] is not None
            ]
        for factor, x, y in updates:
            x, y = factor.together(x), factor.together(y)
            left, right = (x, y) if factor.turned else (y, x)
            rate = G.rates[factor.index]
            left, rate = (left * rate, 1.0) if isinstance(rate, Tensor) else (left, rate)
            target = G.into[factor.index]
            assert target is not None
            factor.map.add_outer_(target, left, right, alpha * rate)

    def scaled(self, parts: Sequence[Any]) -> list[Any]:
        """Those of ``parts``, one a tensor, to which a scaling of the product goes."""
        return [parts[factor.index] for chain in self.chains for factor in chain if factor.share]

    def part(self, W: Factors, scalable: bool) -> "ProductMap | None":
        """The terms of which a factor can be scaled, or those of which none can; None if there are none."""
        chains = tuple(chain for chain in self.chains if bool(scaled(W, chain)) == scalable)
        return replace(self, chains=chains) if chains else None

    def scale_(self, W: Factors, by: Float[Tensor, " blocks"]) -> None:
        """Scale each block of the product in place, by the powers that go to its factors.

        A factor that several blocks share takes its power of the least of theirs, and the others the rest of each.
        """
        for chain in self.chains:
            factors = scaled(W, chain)
            left, whole = by, sum(factor.share for factor in factors)
            for factor in sorted(factors, key=lambda factor: -factor.shared):
                own = left.view(-1, factor.shared).amin(1) ** (factor.share / whole)
                factor.map.scale_(W[factor.index], own)
                left, whole = left / own.repeat_interleave(factor.shared), whole - factor.share

    def matrices(self, W: Factors) -> Float[Tensor, "blocks outputs inputs"]:
        """The blocks, formed: for measures of small products."""
        x = torch.eye(self.inputs, dtype=W.dtype, device=W.device).repeat(1, self.blocks)
        return self.forward(W, x).unflatten(1, (self.blocks, self.outputs)).permute(1, 2, 0)

    def squares(self, W: Factors) -> Float[Tensor, " blocks"]:
        """Not known without the product: NaN."""
        return torch.full((self.blocks,), torch.nan, dtype=torch.float64, device=W.device)


def scaled(W: Factors, chain: Chain) -> list[Factor]:
    """The factors of ``chain`` that a scaling of it goes to: those that are trained and have a share."""
    return [factor for factor in chain if factor.share and W[factor.index].requires_grad]


def passes(W: Factors, chain: Chain, v: Rows) -> list[Rows]:
    """What comes to each factor of ``chain``, and out of the last."""
    rows = [v]
    for factor in chain:
        rows.append(factor.apply(W, rows[-1]))
    return rows


def passes_back(W: Factors, chain: Chain, u: Rows) -> list[Rows]:
    """What comes out of the transpose of each factor, and ``u``, which comes to that of the last."""
    rows = [u]
    for factor in reversed(chain):
        rows.append(factor.apply(W, rows[-1], back=True))
    return rows[::-1]

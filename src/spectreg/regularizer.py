"""The object in the training loop: it keeps one vector a weight and adds φ'(σ)·uvᵀ to the gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectreg.penalties import square
from spectreg.power import Triplet, power_step
from spectreg.weights import Select, Weight, named_weights


class SpectralNormRegularizer:
    """Spectral norm regularization: adds λ/2·Σ σ(W)² to a loss, next to free.

    It leaves the model alone: no buffers, no hooks on modules, no changed keys. Its vectors are drawn from a private
    generator seeded with ``seed``.

    Args:
        model: Its weights are regularized: not biases, not normalization scales.
        strength: λ of Eq. (1) of arXiv:1705.10941.
        select: ``(name, parameter) -> bool``: which of the weights to regularize; all by default.
        seed: Of the first vectors.

    >>> model = nn.Linear(3, 3, bias=False)
    >>> _ = nn.init.eye_(model.weight)
    >>> regularizer = SpectralNormRegularizer(model, strength=0.01)
    >>> regularizer.add_gradient()
    >>> regularizer.sigma()
    {'weight': tensor(1.)}
    """

    def __init__(self, model: nn.Module, strength: float, *, select: Select | None = None, seed: int = 0) -> None:
        self.weights: list[Weight] = named_weights(model, select)
        self.strength = strength
        self._penalty = square()
        generator = torch.Generator().manual_seed(seed)
        self._triplets = {w.name: _first_guess(w, generator) for w in self.weights}
        self._handle: Any = None

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add λφ'(σ)·uvᵀ to the gradient of every weight (Algorithm 1, lines 6 to 9), after one power step each."""
        for weight, (sigma, u, v) in self._step():
            W = weight.tensor
            if W.grad is None:
                W.grad = torch.zeros_like(W)
            slope = self.strength * self._slope(weight, sigma)
            weight.map.matrices(W.grad).baddbmm_((u * slope[:, None]).unsqueeze(2), v.unsqueeze(1))

    def penalty(self) -> Tensor:
        """The penalty λΣφ(σ) as a term of the loss; its gradient is what ``add_gradient`` adds."""
        terms = []
        for weight, (sigma, u, v) in self._step():
            blocks = weight.map.matrices(weight.tensor)
            exact = torch.einsum("bi,bij,bj->b", u, blocks, v)
            chosen = exact if weight.map.norm == "each" else exact[sigma.argmax()]
            terms.append(self._penalty.value(chosen).sum())
        return self.strength * torch.stack(terms).sum()

    def attach(self, optimizer: Optimizer) -> None:
        """Call ``add_gradient`` before every ``optimizer.step()``, whoever calls it."""
        self._handle = optimizer.register_step_pre_hook(lambda *_: self.add_gradient())

    def detach(self) -> None:
        """Undo ``attach``."""
        self._handle.remove()

    def sigma(self) -> dict[str, Tensor]:
        """The spectral norm of each weight as of the last step, by name; for several blocks the largest."""
        return {name: triplet.sigma.max() for name, triplet in self._triplets.items()}

    def state_dict(self) -> dict[str, Any]:
        """Its vectors, by the name of the weight."""
        return {"version": 1, "vectors": {name: t.v.clone() for name, t in self._triplets.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the vectors of ``state``."""
        for name, triplet in self._triplets.items():
            triplet.v.copy_(state["vectors"][name])

    def _step(self) -> list[tuple[Weight, Triplet]]:
        with torch.no_grad():
            for weight in self.weights:
                blocks = weight.map.matrices(weight.tensor)
                self._triplets[weight.name] = power_step(blocks, self._triplets[weight.name].v)
        return [(weight, self._triplets[weight.name]) for weight in self.weights]

    def _slope(self, weight: Weight, sigma: Tensor) -> Tensor:
        slope = self._penalty.slope(sigma)
        if weight.map.norm == "each" or weight.map.blocks == 1:
            return slope
        return torch.zeros_like(slope).scatter(0, sigma.argmax(0, keepdim=True), slope.max())


def _first_guess(weight: Weight, generator: torch.Generator) -> Triplet:
    m = weight.map
    v = torch.randn(m.blocks, m.inputs, generator=generator)
    return Triplet(torch.zeros(m.blocks), torch.zeros(m.blocks, m.outputs), v)

"""What is remembered of each weight from step to step, and its travel to a file and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectreg.weights.selection import Weight


@dataclass
class Memory:
    """The vectors of one weight, its σ, what its penalty aims at, and how often it was called.

    ``counted`` is the number of singular values asked for; a block may have fewer. ``warm``: the vectors have been
    iterated.
    """

    weight: Weight
    u: Float[Tensor, "blocks outputs k"]
    v: Float[Tensor, "blocks inputs k"]
    sigma: Float[Tensor, "blocks k"]
    counted: int
    start: Float[Tensor, "blocks k"] | None = None
    calls: int = 0
    warm: bool = False

    @classmethod
    def first(cls, weight: Weight, k: int, generator: torch.Generator, keeps_start: bool = False) -> "Memory":
        """Gaussian v, made orthonormal: it almost surely has a part along the top singular vector, whatever the map.

        Its state has the names and types of any later one, as a distributed checkpoint wants to know before it loads.
        """
        m = weight.map
        kept = min(k, m.outputs, m.inputs)
        plain: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults of the moment
        v = torch.linalg.qr(torch.randn(m.blocks, m.inputs, kept, generator=generator, **plain)).Q
        v = v.to(torch.promote_types(weight.tensor.dtype, torch.float32))
        sigma = v.new_zeros(m.blocks, kept)
        start = torch.full_like(sigma, torch.nan) if keeps_start else None
        return cls(weight, v.new_zeros(m.blocks, m.outputs, kept), v, sigma, k, start)

    def saved(self) -> dict[str, Any]:
        """A copy that a file can hold."""
        state: dict[str, Any] = {"u": self.u.clone(), "v": self.v.clone(), "sigma": self.sigma.clone()}
        start = {} if self.start is None else {"start": self.start.clone()}
        return state | {"calls": self.calls} | start

    def load(self, saved: Mapping[str, Any]) -> None:
        """Become a copy of what was ``saved``."""
        self.u, self.v, self.sigma = (saved[x].clone() for x in ("u", "v", "sigma"))
        self.calls, self.start = int(saved["calls"]), saved["start"].clone() if "start" in saved else None
        self.warm = bool(self.u.any())


def check_same_weights(memories: Mapping[str, Memory], vectors: Mapping[str, Any]) -> None:
    """Raise unless ``vectors`` were saved of weights of the same names and shapes."""
    torn = [name for name, saved in vectors.items() if not {"u", "v", "sigma", "calls"} <= set(saved)]
    if torn:
        raise ValueError(f"this state is torn: of {', '.join(torn)} it lacks u, v, sigma or calls.")
    missing = [name for name in memories if name not in vectors]
    unexpected = [name for name in vectors if name not in memories]
    different = [
        f"{name} {tuple(vectors[name][x].shape)} instead of {tuple(getattr(m, x).shape)}"
        for name, m in memories.items()
        for x in ("u", "v", "sigma")
        if name in vectors and vectors[name][x].shape != getattr(m, x).shape
    ]
    if missing or unexpected or different:
        raise ValueError(
            f"this state is of another model or map: missing {missing}, unexpected {unexpected}, "
            f"shapes that differ {different}. Build the regularizer as it was when the state was saved."
        )

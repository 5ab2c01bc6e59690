"""Measure: what a network does under perturbations of a given length, random and adversarial."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectreg.linalg.directions import along, gaussian_like, lengths, own_generator, unit
from spectreg.measures._losses import LossFunction, differentiable_input, example_losses, gradient_by_input
from spectreg.measures._model import Batches, as_found, batches_on, device_of

KINDS = ("random", "gradient", "pgd")


@dataclass(frozen=True)
class PerturbationPoint:
    """Means over examples at one radius.

    ``accuracy`` is NaN where the targets are no class numbers. ``stretch`` is the mean of ‖f(x+ξ) − f(x)‖₂/‖ξ‖₂ and
    ``largest_stretch`` its maximum, in units of the output per unit of the input; NaN at radius 0.
    """

    radius: float
    accuracy: float
    loss: float
    stretch: float
    largest_stretch: float
    examples: int


def perturbation_curve(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    radii: Sequence[float],
    kind: str = "random",
    *,
    steps: int = 10,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[PerturbationPoint, ...]:
    """Accuracy, loss and stretch under perturbations ξ with ‖ξ‖₂ equal to each radius, in evaluation mode.

    The model is left as found; its input is not clipped to any range.

    Args:
        loss_fn: Called as ``loss_fn(output[None], target[None])`` under ``torch.vmap``; a scalar.
        batches: Pairs (inputs, targets), read once.
        radii: ℓ2 lengths in the units of the input.
        kind: ``"random"``: a uniform direction for each example, the same at every radius. ``"gradient"``: the
            direction of ∇ₓL (a random one where that is 0). ``"pgd"``: projected gradient ascent on the sphere; the
            worst point seen by the loss, so never below the gradient step, from which its first start sets out.
        steps: Of PGD, each 2.5/steps of the radius.
        restarts: Starts of PGD; those after the first are random.
        generator: Draws directions; by default a private one with seed 0.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> batch = (torch.zeros(3, 2), torch.zeros(3, 1))
    >>> (point,) = perturbation_curve(layer, lambda output, y: output.sum(), [batch], [2.0], "gradient")
    >>> round(point.stretch, 4)  # √2, the norm of the layer
    1.4142
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(KINDS)}.")
    if not radii or not all(0 <= radius < math.inf for radius in radii):
        raise ValueError(f"radii are {list(radii)}: give at least one, each finite and 0 or more.")
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps is {steps} and restarts {restarts}: both must be at least 1.")
    generator = own_generator(generator)
    rows: list[list[Tensor]] = [[] for _ in radii]
    with as_found(model):
        attack = Attack(model, loss_fn, steps, restarts, generator)
        for x, y in batches_on(device_of(model), batches):
            differentiable_input(x)
            first = unit(gaussian_like(x, generator)) if kind == "random" else attack.gradient_direction(x, y)
            with torch.no_grad():
                clean = model(x)
            for row, radius in zip(rows, radii, strict=True):
                direction = attack.search(x, y, radius, first) if kind == "pgd" else first
                row.append(readings(model, loss_fn, x, y, clean, radius * direction))
    return tuple(point(radius, torch.cat(row, 1)) for radius, row in zip(radii, rows, strict=True))


@torch.no_grad()
def readings(model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor, clean: Tensor, xi: Tensor) -> Tensor:
    """Rows: correct, loss, stretch; a column for each example."""
    output = model(x + xi)
    classes = output.ndim == 2 and y.ndim == 1 and not y.is_floating_point()
    correct = (output.argmax(1) == y).double() if classes else torch.full((len(x),), math.nan, dtype=torch.float64)
    stretch = lengths(output - clean) / lengths(xi)
    return torch.stack([correct.cpu(), example_losses(loss_fn, output, y).double().cpu(), stretch.double().cpu()])


def point(radius: float, rows: Tensor) -> PerturbationPoint:
    accuracy, loss, stretch = rows.mean(1).tolist()
    return PerturbationPoint(radius, accuracy, loss, stretch, rows[2].max().item(), rows.shape[1])


@dataclass(frozen=True)
class Attack:
    """Directions that raise the loss of each example."""

    model: nn.Module
    loss_fn: LossFunction
    steps: int
    restarts: int
    generator: torch.Generator

    def losses_and_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = differentiable_input(x)
            losses = example_losses(self.loss_fn, self.model(x), y)
            return losses.detach(), unit(gradient_by_input(losses.sum(), x))

    def gradient_direction(self, x: Tensor, y: Tensor) -> Tensor:
        """The unit gradient of each example; a random direction where it is zero."""
        _, g = self.losses_and_gradient(x, y)
        return torch.where(along(g, lengths(g) > 0), g, unit(gaussian_like(x, self.generator)))

    def search(self, x: Tensor, y: Tensor, radius: float, first: Tensor) -> Tensor:
        """Of all points PGD visits, for each example the direction of the one with the largest loss."""
        best, highest = first, x.new_full((len(x),), -math.inf)
        for start in range(self.restarts):
            direction = first if start == 0 else unit(gaussian_like(x, self.generator))
            for _ in range(self.steps + 1):
                losses, g = self.losses_and_gradient(x + radius * direction, y)
                better = losses > highest
                best = torch.where(along(best, better), direction, best)
                highest = torch.where(better, losses.to(highest), highest)
                direction = unit(direction + 2.5 / self.steps * g)
        return best

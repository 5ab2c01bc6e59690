"""Measure: what a network does under perturbations of a given length, random and adversarial."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectreg.linalg.directions import along, gaussian_like, lengths, own_generator, unit
from spectreg.measures._each import Examples, examples_of
from spectreg.measures._examples import refuse_one_step
from spectreg.measures._forms import loss_of
from spectreg.measures._inputs import differentiable_input, perturbable
from spectreg.measures._model import Batches, as_found, batches_on, device_of
from spectreg.measures._terms import LossFunction
from spectreg.measures.losses import BatchLoss

KINDS = ("random", "gradient", "pgd")


@dataclass(frozen=True)
class PerturbationPoint:
    """Means over the ``examples`` that count in the loss, at one radius.

    ``loss`` is the loss of them all as one batch. ``accuracy`` is NaN where the targets are no classes: it counts
    class numbers, rows that add up to one (one-hot and soft labels), and 0 and 1 beside a single output, where the
    class with the smaller loss is the answer. ``stretch`` is the mean of ‖f(x+ξ) − f(x)‖₂/‖ξ‖₂ and
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
    loss_fn: LossFunction | BatchLoss,
    batches: Batches,
    radii: Iterable[float] | Tensor,
    kind: str = "random",
    *,
    steps: int = 10,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[PerturbationPoint, ...]:
    """Accuracy, loss and stretch under perturbations ξ with ‖ξ‖₂ equal to each radius, in evaluation mode.

    The model is left as found; its input is not clipped to any range.

    Args:
        loss_fn: Called as ``loss_fn(output[None], target[None])`` under ``torch.vmap``, one example at a time; a
            scalar. Or a `BatchLoss`, called with one example at a time and so one forward each; its accuracy is NaN.
        batches: Pairs (inputs, targets), read once. Inputs, outputs and targets have one row an example.
        radii: ℓ2 lengths in the units of the input.
        kind: ``"random"``: a uniform direction for each example, the same at every radius. ``"gradient"``: the
            direction of ∇ₓL (a random one where that is 0). ``"pgd"``: projected gradient ascent on the sphere; the
            worst point seen by the loss, so never below the gradient step, from which its first start sets out.
        steps: Of PGD, each 2.5/steps of the radius.
        restarts: Starts of PGD; those after the first are random.
        generator: Draws directions; by default a private one with seed 0.

    Raises:
        ValueError: No example; a setting out of range; a loss that is not a scalar, or neither a mean nor a sum of
            what its examples add; examples that influence each other or lie along another dimension than the first.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> batch = (torch.zeros(3, 2), torch.zeros(3, 1))
    >>> (point,) = perturbation_curve(layer, lambda output, y: output.sum(), [batch], [2.0], "gradient")
    >>> round(point.stretch, 4)  # √2, the norm of the layer
    1.4142
    """
    radii = [float(radius) for radius in radii]
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(KINDS)}.")
    if not radii or not all(0 <= radius < math.inf for radius in radii):
        raise ValueError(f"radii are {radii}: give at least one, each finite and 0 or more.")
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps is {steps} and restarts {restarts}: both must be at least 1.")
    attack = Attack(steps, restarts, own_generator(generator))
    loss = loss_of(loss_fn)
    rows: list[list[Tensor]] = [[] for _ in radii]
    is_open = True
    with as_found(model):
        for batch in loss.begin(model, perturbable(loss, batches_on(device_of(model), batches))):
            x = differentiable_input(batch[loss.place(batch)]).detach()
            refuse_lost(x, radii)
            examples = examples_of(model, loss, batch, x)
            is_open = is_open and examples.is_open
            first = unit(gaussian_like(x, attack.generator)) if kind == "random" else attack.direction(examples, x)
            for row, radius in zip(rows, radii, strict=True):
                direction = attack.search(examples, x, radius, first) if kind == "pgd" else first
                row.append(readings(examples, x, radius * direction))
    if is_open:
        refuse_one_step(x.shape)
    return tuple(point(radius, torch.cat(row, 1)) for radius, row in zip(radii, rows, strict=True))


def refuse_lost(x: Tensor, radii: Sequence[float]) -> None:
    """Raise if a radius is of the size of the rounding of the inputs, in which a perturbation is lost."""
    least = 16 * torch.finfo(x.dtype).eps * lengths(x.double()).max().item()
    if lost := [radius for radius in radii if 0 < radius < least]:
        raise ValueError(
            f"the radius {lost[0]:g} is lost in the rounding of {x.dtype}, of inputs as long as these: give one from "
            f"{least:.2g} on, or a model and inputs of higher precision."
        )


@torch.no_grad()
def readings(examples: Examples, x: Tensor, xi: Tensor) -> Tensor:
    """Rows: weight, correct, loss, stretch, 0 or 1 for a target that may be a class; a column for each example."""
    losses, output = examples(x + xi)
    stretch = lengths(examples.flat(output) - examples.clean) / lengths(xi)
    columns = examples.weights, examples.correct(output), losses, stretch, examples.zero_or_one
    return torch.stack([column.double().cpu() for column in columns])


def point(radius: float, rows: Tensor) -> PerturbationPoint:
    weights, correct, losses, stretch, targets = rows[:, rows[0] > 0]
    if bool((targets == targets[:1]).all()):  # zeros alone are no classes but values
        correct = torch.full_like(correct, math.nan)
    if not len(weights):
        raise ValueError("no target counts in the loss: there is nothing to average.")
    loss = torch.dot(weights, losses) / weights.sum()
    return PerturbationPoint(
        radius, correct.mean().item(), loss.item(), stretch.mean().item(), stretch.max().item(), len(weights)
    )


@dataclass(frozen=True)
class Attack:
    """Directions that raise the loss of each example."""

    steps: int
    restarts: int
    generator: torch.Generator

    def direction(self, examples: Examples, x: Tensor) -> Tensor:
        """The unit gradient of each example; a random direction where it is zero."""
        _, g = examples.losses_and_gradient(x)
        return torch.where(along(g, lengths(g) > 0), g, unit(gaussian_like(x, self.generator)))

    def search(self, examples: Examples, x: Tensor, radius: float, first: Tensor) -> Tensor:
        """Of all points PGD visits, for each example the direction of the one with the largest loss."""
        best, highest = first, x.new_full((len(x),), -math.inf)
        for start in range(self.restarts):
            direction = first if start == 0 else unit(gaussian_like(x, self.generator))
            for _ in range(self.steps + 1):
                losses, g = examples.losses_and_gradient(x + radius * direction)
                better = losses > highest
                best = torch.where(along(best, better), direction, best)
                highest = torch.where(better, losses.to(highest), highest)
                direction = unit(direction + 2.5 / self.steps * g)
        return best

"""The examples of a batch, each with its loss, its weight in the loss of all, and whether its class is right."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectreg.linalg.directions import unit
from spectreg.measures._examples import are_rows, checked_dimension, each_loss, example_weights, may_be_one_step
from spectreg.measures._forms import PairLoss, WholeLoss, call
from spectreg.measures._inputs import differentiable_input, gradient_by_input, with_input
from spectreg.measures._nested import mapped, rows_of, tensors
from spectreg.measures._outputs import flat_rows, output_of


@dataclass
class Examples:
    """A batch of pairs whose inputs are about to be perturbed.

    ``clean`` holds the unperturbed outputs, a row an example; ``weights`` what each example adds to the terms;
    ``targets`` how many of these there are in the loss of each, where that is a sum.
    ``is_open`` is for a batch that `may_be_one_step`.
    """

    model: nn.Module
    loss: Any
    batch: Any
    clean: Tensor
    weights: Tensor
    is_open: bool = False
    targets: float = 1.0

    def __call__(self, x: Tensor) -> tuple[Tensor, Any]:
        """The loss of each example at the inputs ``x``, and the outputs there."""
        output = call(self.model, x)
        return each_loss(self.loss.of, output, self.batch[1]) / self.targets, output

    def flat(self, output: Any) -> Tensor:
        return flat_rows(output, len(self.clean))

    @property
    def zero_or_one(self) -> Tensor:
        """The targets where they are numbers 0 and 1 that may stand for classes, else NaN."""
        y, n = self.batch[1], len(self.clean)
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel() == n and is_binary(y):
            return y.reshape(n)
        return torch.full((n,), math.nan, device="cpu")

    def losses_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each example, and its unit gradient by the input; zero for those that do not count."""
        with torch.enable_grad():
            x = differentiable_input(x)
            losses, _ = self(x)
            g = gradient_by_input(losses.sum(), x)
        counts = (self.weights > 0).to(g.device).reshape(-1, *[1] * (g.ndim - 1))
        return losses.detach(), unit(torch.where(counts, g, 0.0))

    def correct(self, output: Any) -> Tensor:
        """1 for each example whose class is the target, 0 for the others; NaN where targets are no classes."""
        y, n = self.batch[1], len(self.clean)
        if isinstance(output, Tensor) and isinstance(y, Tensor):
            if output.ndim == 2 and output.shape[1] > 1:
                if y.ndim == 1 and not y.is_floating_point():
                    return output.argmax(1) == y
                if y.shape == output.shape and is_distribution(y):
                    return output.argmax(1) == y.argmax(1)
            elif output.numel() == y.numel() == n and is_binary(y):
                return each_loss(self.loss.of, output, y) < each_loss(self.loss.of, output, (y == 0).to(y.dtype))
        return torch.full((n,), math.nan, dtype=torch.float64, device="cpu")


class WholeExamples(Examples):
    """The examples of a batch of any form, each a batch by itself."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Any]:
        """The loss of each example at the inputs ``x``, and the outputs there."""
        given = with_input(self.batch, self.loss.place(self.batch), x)
        return torch.stack([value.loss for value in self.values(given)]), self.outputs(given)

    def values(self, batch: Any) -> list[Any]:
        n = len(self.clean)
        return [self.loss(self.model, rows_of(batch, i, i + 1)) for i in range(n)]

    def outputs(self, batch: Any) -> Any:
        with torch.no_grad(), output_of(self.model) as outputs:
            self.loss(self.model, batch)
        return outputs.last

    @property
    def zero_or_one(self) -> Tensor:
        """NaN: what the targets are only the function knows."""
        return torch.full((len(self.clean),), math.nan, device="cpu")

    def correct(self, output: Any) -> Tensor:
        """NaN, for the same reason."""
        return torch.full((len(self.clean),), math.nan, dtype=torch.float64, device="cpu")


def examples_of(model: nn.Module, loss: PairLoss | WholeLoss, batch: Any, x: Tensor) -> Examples:
    """The examples of ``batch``, once it is clear that they are rows and independent of each other."""
    n = len(x)
    with torch.enable_grad(), output_of(model) as outputs:
        x = differentiable_input(x)
        value = loss(model, with_input(batch, loss.place(batch), x))
        if checked_dimension(x, outputs.last) != 0:
            raise ValueError(
                "the examples lie along the second dimension of the inputs (time first?): give them along the first, "
                "and a model that turns them round."
            )
        is_open = may_be_one_step(x, outputs.last)
    output = mapped(lambda t: t.detach(), outputs.last)
    clean = flat_rows(output, n)
    if isinstance(loss, WholeLoss):
        return whole_examples(model, loss, batch, clean, value, is_open)
    if not are_rows(n, output, batch[1]):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors(batch[1]))
        raise ValueError(f"the targets have shape {shapes} for {n} examples: they need one row for each example.")
    weights, targets = torch.zeros(n, dtype=torch.float64, device="cpu"), 1.0
    if value.factor:
        is_mean = loss.known_terms.is_mean
        targets = 1.0 if is_mean else value.count / n
        weights = example_weights(loss.of, output, batch[1], is_mean) * (value.count if is_mean else targets)
    return Examples(model, loss, batch, clean, weights, is_open, targets)


def whole_examples(
    model: nn.Module, loss: WholeLoss, batch: Any, clean: Tensor, value: Any, is_open: bool
) -> WholeExamples:
    """Weights from the function's own counts, which must add up to what it says of the whole batch."""
    n = len(clean)
    if not are_rows(n, batch):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors(batch))
        raise ValueError(f"the batch has tensors of shapes {shapes}: one row for each of its {n} examples is needed.")
    examples = WholeExamples(model, loss, batch, clean, torch.ones(n, device="cpu"), is_open)
    with torch.no_grad():
        alone = examples.values(batch)
    examples.weights = weights = torch.tensor([v.count for v in alone], dtype=torch.float64, device="cpu")
    losses = torch.tensor([v.loss.item() for v in alone], dtype=torch.float64, device="cpu")
    expected = (weights * losses)[weights > 0].sum().item() / weights.sum().item() if weights.any() else 0.0
    if value.factor and not math.isclose(value.loss.item(), expected, rel_tol=1e-3, abs_tol=1e-9):
        raise ValueError(
            f"BatchLoss: the batch's loss is {value.loss.item():.6g}, the mean over its examples by their counts is "
            f"{expected:.6g}: return (mean loss, number of terms) for batches of any size."
        )
    return examples


def is_binary(y: Tensor) -> bool:
    return bool(((y == 0) | (y == 1)).all())


def is_distribution(y: Tensor) -> bool:
    """Whether every row is a distribution over the classes: one-hot, or soft."""
    y = y.double()
    return bool((y >= 0).all()) and bool(((y.sum(1) - 1).abs() < 0.01).all())

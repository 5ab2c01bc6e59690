"""Both forms of a loss as one: a function of model and batch, with what the batch weighs among others."""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from spectreg.measures._nested import copied, rows_of, tensors
from spectreg.measures._terms import BY_HAND, WAY_OUT, LossFunction, Part, Terms, near_half, refuse, scalar
from spectreg.measures.losses import BatchLoss


@dataclass(frozen=True)
class BatchValue:
    """The loss of a batch, the factor it has in the loss of all batches, and the terms that it counts there."""

    loss: Tensor
    factor: float
    count: float


class PairLoss:
    """``loss_fn(model(x), y)`` on pairs (x, y)."""

    def __init__(self, function: LossFunction) -> None:
        self.function = function
        self.terms: Terms | None = None

    def __call__(self, model: nn.Module, batch: Any) -> BatchValue:
        """The loss of a batch and what it weighs."""
        output = call(model, batch[0])
        loss = self.of(output, batch[1])
        if self.known_terms.reference is None and not loss.isfinite():
            raise ValueError("the loss is not finite: no target counts in it, or the data or weights have NaN or inf.")
        return BatchValue(loss, *self.known_terms.weigh(output, batch[1]))

    @property
    def known_terms(self) -> Terms:
        assert self.terms is not None, "begin comes first"
        return self.terms

    def of(self, output: Any, y: Any) -> Tensor:
        """The loss of outputs and targets; an error says what the outputs are where the function cannot take them."""
        try:
            return scalar(self.function(output, y))
        except (TypeError, AttributeError) as error:
            if isinstance(output, Tensor):
                raise
            raise ValueError(
                f"loss_fn fails on the model's output, a {type(output).__name__} ({error}): give "
                "lambda output, y: loss_fn(output.logits, y), or a spectreg.BatchLoss."
            ) from error

    def begin(self, model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, each read once, after the first of them have shown what kind of loss it is."""
        following, output = iter(batches), None
        read: list[Any] = []
        silent: list[Part] = []
        while self.terms is None:
            batch = next(following, None)
            if batch is None:
                self.terms = Terms(None)
                refuse_unseen(len(read), output)
                refuse_seen_together(silent)
                break
            check_pair(batch)
            read.append(batch)
            with torch.no_grad():
                output = call(model, batch[0])
            self.terms = self._terms_of(output, batch[1], silent)
        for batch in chain(read, following):
            check_pair(batch)
            yield batch

    def _terms_of(self, output: Any, y: Any, silent: list[Part]) -> Terms | None:
        """What the loss weighs batches by, if this one tells; else it is among the ``silent`` ones, two of them."""
        with torch.no_grad():
            loss = self.of(output, y)
        if not any(x.is_floating_point() for x in tensors(output)):
            return None
        part = Part.of(self.of, output, y)
        if part.tells:
            return Terms(part)
        if loss.isfinite():
            with suppress(ValueError):  # of a loss that takes no outputs near ½
                near = Part.of(self.of, near_half(output, 1 / 256), y)
                if near.tells:
                    return Terms(near)
        if len(silent) < 2:
            silent.append(part)
        return None

    def place(self, batch: Any) -> Any:
        """The input is the first of the pair."""
        check_pair(batch)
        return 0


class WholeLoss:
    """A `BatchLoss`, checked once: that several batches are counted, and that what is counted is a mean."""

    def __init__(self, given: BatchLoss) -> None:
        self.given = given
        self.checked = False

    def __call__(self, model: nn.Module, batch: Any) -> BatchValue:
        """The loss of a batch and what it weighs."""
        result = self.given.function(model, copied(batch))
        if not isinstance(result, tuple):
            return BatchValue(scalar(result), 1.0, 1.0)
        if len(result) != 2:
            raise ValueError(f"BatchLoss: the function gave {len(result)} values: return the loss, or (loss, count).")
        loss, count = scalar(result[0]), float(result[1])
        if not 0 <= count < math.inf:
            raise ValueError(f"BatchLoss: the count is {count}: it must be the number of terms, 0 or more.")
        return BatchValue(loss, count, count)

    def begin(self, model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, with a look at what the function gives for the first two."""
        uneven = None
        for i, batch in enumerate(batches):
            if not self.checked and i < 2:
                if i == 1 and self._counted(model, batch) is None:
                    raise ValueError("BatchLoss: with several batches the function must return (mean loss, count).")
                uneven = uneven or self._unequal_to_its_halves(model, batch)
                if i == 1 and uneven:  # of a single batch the count does not matter
                    raise ValueError(uneven)
            self.checked = self.checked or i == 1
            yield batch

    @torch.no_grad()
    def _counted(self, model: nn.Module, batch: Any) -> tuple[float, float] | None:
        """Loss and count of a batch; None where there is no count."""
        if not isinstance(self.given.function(model, copied(batch)), tuple):
            return None
        value = self(model, batch)
        return value.loss.item() if value.count else 0.0, value.count

    def _unequal_to_its_halves(self, model: nn.Module, batch: Any) -> str | None:
        """What is wrong where a batch's loss is not the mean of those of its halves by their counts.

        Halves of the examples, which lie along the first dimension, or along the second (time first).

        Raises:
            ValueError: The losses of the halves add up.
        """
        wrong = None
        for dim in (0, 1):
            sizes = {x.shape[dim] for x in tensors(batch) if x.ndim > dim}
            if len(sizes) != 1 or max(sizes) < 2 or (dim and any(x.ndim == 1 for x in tensors(batch))):
                continue
            try:
                difference = self._unequal_along(model, batch, dim, max(sizes))
            except Exception:  # half of the features, if it is these that lie there, is nothing that a model takes
                if not dim:
                    raise
                continue
            if difference is None:
                return None
            wrong = wrong or difference
        return wrong

    def _unequal_along(self, model: nn.Module, batch: Any, dim: int, n: int) -> str | None:
        whole = self._counted(model, batch)
        if whole is None:
            return None
        halves = [self._counted(model, rows_of(batch, *rows, dim)) for rows in ((0, n // 2), (n // 2, n))]
        (first, count), (second, other) = (half or (math.nan, math.nan) for half in halves)
        with torch.no_grad():
            tolerance = 4 * torch.finfo(self(model, batch).loss.dtype).eps ** 0.5
        size = abs(first * count) + abs(second * other)
        if abs(whole[0] * whole[1] - first * count - second * other) <= tolerance * size:
            return None
        if abs(whole[0] - first - second) <= tolerance * (abs(first) + abs(second)) and whole[1] == count + other:
            raise ValueError("BatchLoss: the function returns the sum of its terms: return (sum / count, count).")
        return (
            f"BatchLoss: a batch has loss {whole[0]:.6g} and count {whole[1]:g}, its halves {first:.6g} with {count:g} "
            f"and {second:.6g} with {other:g}: that is not their mean by these counts. Return (mean loss, number of "
            "terms it is the mean of), or give one batch."
        )

    def place(self, batch: Any) -> Any:
        """Key or index of the input in ``batch``."""
        if self.given.input is not None:
            return self.given.input
        if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor):
            return 0
        items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        floating = [key for key, value in items if isinstance(value, Tensor) and value.is_floating_point()]
        if len(floating) != 1:
            raise ValueError(
                f"the batch has {len(floating)} floating point tensors ({', '.join(map(str, floating))}): say which "
                "one is the input by BatchLoss(function, input=...)."
            )
        return floating[0]


def loss_of(loss_fn: LossFunction | BatchLoss) -> PairLoss | WholeLoss:
    """Either form of a loss as something to call with model and batch."""
    return WholeLoss(loss_fn) if isinstance(loss_fn, BatchLoss) else PairLoss(loss_fn)


def refuse_unseen(batches: int, output: Any) -> None:
    """Raise where a loss without a slope by any row may be hidden in an output: what it is the mean of is not seen."""
    found = tensors(output)
    if batches and not found:
        raise ValueError(f"the model gives a {type(output).__name__}, in which no tensor is seen: give {BY_HAND}.")
    numbers = [x for x in found if not x.ndim]
    if batches > 1 and (len(numbers) == len(found) or any(x.is_floating_point() for x in numbers)):
        raise ValueError(
            f"no output with rows does anything to the loss, so that batches cannot be weighed: {WAY_OUT}."
        )


def refuse_seen_together(silent: list[Part]) -> None:
    """Raise where batches without a slope of their own have one together: of one example each, compared in pairs."""
    if len(silent) > 1 and silent[0].with_examples_of(silent[1])[0].tells:
        refuse("batches in which no output does anything to it do so together")


def check_pair(batch: Any) -> None:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"batches gave {type(batch).__name__}: each batch must be a pair (inputs, targets). For others give "
            "spectreg.BatchLoss(function) with function(model, batch) -> (mean loss, number of terms)."
        )


def call(model: nn.Module, x: Any) -> Any:
    """``model(x)``, or ``model(**x)`` for a mapping whose keys are arguments of the model; of copies."""
    x = copied(x)
    if isinstance(x, Mapping):
        try:
            inspect.signature(model.forward).bind(**x)
        except TypeError:
            return model(x)
        return model(**x)
    return model(x)

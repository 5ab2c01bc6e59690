"""What the losses of batches weigh in the loss of all their examples, read off what the loss function does.

A training loop's loss is the mean or the sum of terms, and only the loss function knows which and over how many: class
weights, ignored targets, one term a token. Joining two batches tells: in a mean of terms, the gradient of the joined
loss by the outputs of one of them is that of its own loss, times its share of the terms.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spectreg.linalg.directions import own_generator
from spectreg.measures._nested import mapped, tensors, with_tensors

LossFunction = Callable[[Any, Any], Tensor]

BY_HAND = "spectreg.BatchLoss(function) with function(model, batch) -> (mean loss, number of terms)"
WAY_OUT = f"give one batch, or {BY_HAND}"


def scalar(loss: Any) -> Tensor:
    """The loss as it came; an error unless it is one number."""
    if not isinstance(loss, Tensor):
        raise ValueError(f"the loss is a {type(loss).__name__}: it must be a scalar tensor.")
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}: it must be a scalar. Use reduction='mean'.")
    return loss.reshape(())


@dataclass(frozen=True)
class Part:
    """Some examples: the model's outputs, pulled to generic values where few gradients vanish, and the targets."""

    loss_fn: LossFunction
    output: Any
    y: Any

    @classmethod
    def of(cls, loss_fn: LossFunction, output: Any, y: Any) -> "Part":
        """Half precision, too coarse to judge equalities by, is widened where the loss function takes float32."""
        generator = own_generator(None)
        part = cls(loss_fn, mapped(lambda x: generic(x, generator), output), y)
        wide = cls(loss_fn, mapped(widened, part.output), mapped(widened, y))
        if wide.tolerance < part.tolerance:
            with suppress(ValueError):
                _ = wide.loss_and_gradients
                return wide
        return part

    @cached_property
    def loss_and_gradients(self) -> tuple[float, list[Tensor]]:
        """The loss, and its gradient by every floating point output that has rows, in float64."""
        with torch.enable_grad():
            outputs = differentiable(self.output)
            try:
                value = self.loss_fn(with_tensors(self.output, outputs), self.y)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the user's own code, which can raise anything
                raise ValueError(
                    "loss_fn fails on outputs near those of the model, or on a batch joined with another, by which it "
                    f"is told what the loss is the mean of ({type(error).__name__}: {error}): give {BY_HAND}."
                ) from error
            loss = scalar(value)
            leaves = [x for x in outputs if x.requires_grad and x.ndim]
            slopes: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if loss.requires_grad and leaves:
                slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, slopes, strict=True)]
        return loss.item(), [g.double() for g in gradients]

    def with_examples_of(self, other: "Part") -> tuple["Part", list[int]]:
        """Both in one batch, and along which dimension each floating point output is joined."""
        outputs = [join(x, z) for x, z in zip(tensors(self.output), tensors(other.output), strict=True)]
        targets = [join(x, z)[0] for x, z in zip(tensors(self.y), tensors(other.y), strict=True)]
        both = Part(self.loss_fn, with_tensors(self.output, [x for x, _ in outputs]), with_tensors(self.y, targets))
        return both, [d for x, d in outputs if x.is_floating_point() and x.ndim]

    @property
    def tells(self) -> bool:
        """Whether the loss is finite and has a slope, so that its share in a joined loss can be seen."""
        loss, gradients = self.loss_and_gradients
        return abs(loss) < torch.inf and any(bool(g.any()) and bool(g.isfinite().all()) for g in gradients)

    @property
    def tolerance(self) -> float:
        """For equalities between numbers of the outputs' precision."""
        return 4 * self.eps**0.5

    @property
    def eps(self) -> float:
        return max(torch.finfo(x.dtype).eps for x in tensors(self.output) if x.is_floating_point())


def generic(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x`` pulled a random way towards ½, so that probabilities, positive and real numbers stay what they are."""
    if not x.is_floating_point():
        return x
    pull = 0.5 * uniform_like(x, generator)
    return (1 - pull) * x.detach() + pull / 2


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 where it is of half precision."""
    return x.float() if x.is_floating_point() and torch.finfo(x.dtype).bits < 32 else x


def near_half(output: Any, spread: float) -> Any:
    """Random numbers between ½ − spread and ½ + spread in place of the floating point outputs."""
    generator = own_generator(None)

    def drawn(x: Tensor) -> Tensor:
        return 0.5 + spread * (2 * uniform_like(x, generator) - 1) if x.is_floating_point() else x

    return mapped(drawn, output)


def uniform_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers between 0 and 1 in the shape, type and place of ``x``, drawn where the generator lives."""
    drawn = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return drawn.to(x.device, x.dtype)


def differentiable(output: Any) -> list[Tensor]:
    """The tensors of ``output`` as leaves of a graph, where they are floating point."""
    return [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors(output)]


def join(a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """Both along the dimension in which they differ, or the first, and which that is."""
    differing = [d for d in range(a.ndim) if a.ndim == b.ndim and a.shape[d] != b.shape[d]]
    if a.ndim != b.ndim or len(differing) > 1:
        raise ValueError(
            f"batches give outputs or targets of shapes {tuple(a.shape)} and {tuple(b.shape)}, whose losses cannot be "
            f"weighed against each other: {WAY_OUT}."
        )
    d = differing[0] if differing else 0
    return (torch.cat([a, b], d), d) if a.ndim else (a, 0)


def shares(a: Part, b: Part) -> tuple[float, float]:
    """The factors that carry the gradients of ``a`` and ``b`` into that of both joined; ``a`` must tell.

    Raises:
        ValueError: The joined loss is neither the weighted mean nor the sum of theirs.
    """
    both, dims = a.with_examples_of(b)
    loss, joined = both.loss_and_gradients
    own, other = a.loss_and_gradients[1], b.loss_and_gradients[1]
    firsts = [g.narrow(d, 0, x.shape[d]) for g, x, d in zip(joined, own, dims, strict=True)]
    lasts = [g.narrow(d, x.shape[d], z.shape[d]) for g, x, z, d in zip(joined, own, other, dims, strict=True)]
    share_a = ratio(firsts, own, a.tolerance)
    if b.tells:
        share_b = ratio(lasts, other, a.tolerance)
        if min(share_a, share_b) <= 0:
            refuse("one of two batches does not count beside the other")
        expected = share_a * a.loss_and_gradients[0] + share_b * b.loss_and_gradients[0]
        size = abs(a.loss_and_gradients[0]) + abs(b.loss_and_gradients[0])
        if not abs(loss - expected) <= a.tolerance * size:
            refuse(f"two batches joined have the loss {loss:.6g}, their terms would give {expected:.6g}")
    elif any(bool(g.any()) for g in lasts) or not abs(loss) < torch.inf:
        refuse(f"a batch whose own loss is {b.loss_and_gradients[0]:.6g} counts beside another")
    else:  # no term of it counts, or all are where the loss is flat
        share_b = max(0.0, 1 - share_a)
        share_b = 0.0 if share_b <= a.tolerance else share_b
    return share_a, share_b


def ratio(joined: list[Tensor], own: list[Tensor], tolerance: float) -> float:
    """The number s with ``joined = s·own``; an error if there is none."""
    scale = max(g.abs().max().item() for g in own if g.numel())
    j, o = (torch.cat([g.flatten() / scale for g in gradients]) for gradients in (joined, own))
    s = (torch.dot(j, o) / torch.dot(o, o)).item()
    if not torch.linalg.vector_norm(j - s * o) <= tolerance * max(s, tolerance) * torch.linalg.vector_norm(o):
        refuse("what an output does to it depends on the other examples")
    return s


def refuse(why: str) -> None:
    raise ValueError(f"loss_fn is neither the mean nor the sum of terms of its batch ({why}): {WAY_OUT}.")


class Terms:
    """Weighs batches against the first one that tells: ``weigh`` gives the factor of a batch's loss, and its terms.

    The loss of all examples is Σ factor·loss / Σ terms. Of a mean, a batch's terms are counted in those of the first
    one, and the factor is as large. A sum is divided by the number of targets.
    """

    def __init__(self, reference: Part | None) -> None:
        self.reference = reference
        self.is_mean = True
        if reference is not None:
            share, _ = shares(reference, reference)
            self.is_mean = abs(share - 0.5) <= reference.tolerance
            if not self.is_mean and abs(share - 1) > reference.tolerance:
                refuse(f"a batch that comes twice counts {share:.4g} each time")

    def weigh(self, output: Any, y: Any) -> tuple[float, float]:
        if self.reference is None:  # nothing has a slope: the loss is taken for the mean of its rows
            rows = next((len(x) for x in tensors(y) + tensors(output) if x.ndim), 1)
            return float(rows), float(rows)
        if not self.is_mean:
            refuse_left_out(self.reference.loss_fn, output, y)
            return 1.0, float(count_of_targets(output, y))
        part = Part.of(self.reference.loss_fn, output, y)
        first, other = shares(self.reference, part)
        if abs(first + other - 1) > self.reference.tolerance:
            refuse(f"the shares of two batches add up to {first + other:.4g}")
        return other / first, other / first


def refuse_left_out(loss_fn: LossFunction, output: Any, y: Any) -> None:
    """Raise if a sum leaves out some class numbers: at equal outputs, where every term has a slope, theirs has none."""
    target = next(iter(tensors(y)), None)
    if target is None or target.is_floating_point():
        return
    _, gradients = Part(loss_fn, mapped(lambda x: torch.full_like(x, 0.5), output), y).loss_and_gradients
    for g in gradients:
        removed = [(d, g.shape[:d] + g.shape[d + 1 :]) for d in range(g.ndim)]
        classes = [d for d, shape in removed if shape == target.shape]
        classes = classes or [d for d, shape in removed if math.prod(shape) == target.numel()]
        rows = [g.any(d) for d in classes]
        if rows and g.any() and not any(bool(some.all()) for some in rows):
            raise ValueError(
                "the loss is a sum that leaves out some targets (ignore_index?), so that its mean is not known: "
                "use reduction='mean'."
            )


def count_of_targets(output: Any, y: Any) -> int:
    """By how many a summed loss is divided: every class number, or every row of other targets."""
    some = tensors(y) or tensors(output)
    first = some[0]
    if first.is_floating_point() or not tensors(y):
        return len(first) if first.ndim else 1
    if (first < 0).any():
        raise ValueError(
            f"the loss is a sum, and targets such as {first.min().item()} may not count in it, so that its mean is not "
            "known: use reduction='mean'."
        )
    return first.numel()

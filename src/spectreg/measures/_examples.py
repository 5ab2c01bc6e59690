"""The examples of a batch one by one: along which dimension they lie, the loss of each, and what it weighs."""

from typing import Any

import torch
from torch import Tensor

from spectreg.linalg.directions import own_generator
from spectreg.measures._nested import tensors, with_tensors
from spectreg.measures._terms import LossFunction, Part, differentiable, near_half, refuse, scalar


def example_dimension(x: Tensor, output: Any) -> int | None:
    """The dimension of ``x``, first or second, along which every output depends on one place alone; None if neither.

    Looks at three outputs that have a slope, see `sample`; ``output`` keeps its graph.
    """
    return next((d for d, places in enumerate(reached_places(x, output)) if all(len(p) <= 1 for p in places)), None)


def reached_places(x: Tensor, output: Any) -> list[list[list[int]]]:
    """For the first and the second dimension: the places along it that each of up to three outputs depends on."""
    first = next((t for t in tensors(output) if t.is_floating_point()), None)
    if first is None:
        raise ValueError(f"the model gives a {type(output).__name__}, in which no floating point tensor is seen.")
    flat = first.flatten()
    masks: list[Tensor] = []
    for i in sample(flat) if flat.requires_grad else ():
        (g,) = torch.autograd.grad(flat[i], x, retain_graph=True, allow_unused=True)
        if g is not None and g.any():
            masks.append(g != 0)
        if len(masks) == 3:
            break
    return [
        [mask.movedim(d, 0).reshape(x.shape[d], -1).any(1).nonzero().flatten().tolist() for mask in masks]
        for d in range(min(2, x.ndim))
    ]


def sample(flat: Tensor) -> list[int]:
    """The first, middle and last output and some random ones, not zero if others are: a ReLU at 0 has no slope."""
    live = flat.detach().nonzero().flatten()
    n, generator = len(live) or len(flat), own_generator(None)
    drawn = torch.randint(n, (13,), generator=generator, device=generator.device).tolist() if n else []
    places = dict.fromkeys([*(0, n // 2, n - 1)[:n], *drawn])
    return [int(live[i]) if len(live) else i for i in places]


def checked_dimension(x: Tensor, output: Any) -> int:
    """`example_dimension`; an error where the examples are not independent of each other."""
    d = example_dimension(x, output)
    if d is None:
        raise ValueError(
            "an output depends on more than one example of its batch (batch normalization without running statistics, "
            "attention across the batch?): there is no gradient of an example's own loss by its input."
        )
    return d


def may_be_one_step(x: Tensor, output: Any) -> bool:
    """Whether ``x`` is one example of several places, or one place of several examples, and no output tells which."""
    if x.ndim < 3 or len(x) > 1:
        return False
    _, places = reached_places(x, output)
    return all(len(p) <= 1 for p in places) and len({place for p in places for place in p}) > 1


def refuse_one_step(shape: torch.Size) -> None:
    """Raise since only inputs that `may_be_one_step` were given."""
    raise ValueError(
        f"inputs of shape {tuple(shape)} may be one example or, with time first, {shape[1]} of them at one step: no "
        "output depends on two of these. Give a batch with more than one along the first dimension, or examples first "
        "and a model that turns them round."
    )


def are_rows(n: int, *trees: Any) -> bool:
    """Whether every tensor has one row for each of ``n`` examples."""
    return all(x.ndim and len(x) == n for tree in trees for x in tensors(tree))


def each_loss(loss_fn: LossFunction, output: Any, y: Any) -> Tensor:
    """The loss of each row of outputs and targets by itself; NaN where it is the mean of nothing.

    >>> each_loss(torch.nn.functional.mse_loss, torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))
    tensor([1., 4.])
    """
    outputs, targets = tensors(output), tensors(y)
    count = len(outputs)

    def one(*rows: Tensor) -> Tensor:
        single = [row[None] for row in rows]
        return scalar(loss_fn(with_tensors(output, single[:count]), with_tensors(y, single[count:])))

    try:
        return torch.vmap(one, randomness="different")(*outputs, *targets)
    except ValueError as error:
        raise ValueError(
            f"loss_fn fails on one example by itself ({error}): it must take batches of any size, such as "
            "output.squeeze(1) does and output.squeeze() does not."
        ) from error
    except Exception:  # a loss with a branch or a mask of its own cannot be vectorised
        return torch.stack([one(*rows) for rows in zip(*outputs, *targets, strict=True)])


def example_weights(loss_fn: LossFunction, output: Any, y: Any, is_mean: bool) -> Tensor:
    """The share of each row in the batch's loss: adding up to 1 in a mean, each 1 in a sum; 0 for rows left out."""
    n = len(tensors(output)[0])
    if not is_mean:
        return torch.ones(n, dtype=torch.float64, device="cpu")
    part, own, joined, tells = telling(loss_fn, output, y)
    if not tells.any():  # flat everywhere: nothing tells one from another
        if part.tells:
            refuse("examples by themselves do nothing to it, and together they do")
        return torch.full((n,), 1 / n, dtype=torch.float64, device="cpu")
    weights = torch.where(tells, (own * joined).sum(1) / own.square().sum(1), 0.0)
    off = torch.where(tells[:, None], joined - weights[:, None] * own, joined).abs().max()
    if not off <= part.tolerance * max(1 / n, weights.max().item()) * own[tells].abs().max():
        refuse("what an example adds to it depends on the others")
    if not (weights[tells] > 0).all():
        refuse("an example does not count beside the others")
    missing = 1 - weights.sum().item()
    flat = own.isfinite().all(1) & ~tells
    if missing > part.tolerance and flat.any():  # examples that count, where their loss is flat
        weights[flat] = share = missing / int(flat.sum())
        if (weights[tells] - share).abs().max() > part.tolerance * share:
            refuse("what the examples weigh is not alike, and where their loss is flat it cannot be told")
    elif abs(missing) > part.tolerance:
        refuse(f"the shares of its examples add up to {1 - missing:.4g}")
    return weights.cpu()


def telling(loss_fn: LossFunction, output: Any, y: Any) -> tuple[Part, Tensor, Tensor, Tensor]:
    """A part, its `slopes`, and which rows have any: at the outputs, or near ½ where more rows have.

    What a row weighs does not depend on the outputs, and at theirs its loss may be flat: a hinge that is satisfied, a
    softmax without doubt. Near ½ hardly any loss is.
    """
    tried: list[tuple[Part, Tensor, Tensor, Tensor]] = []
    for outputs in (output, near_half(output, 1 / 4), near_half(output, 1 / 256)):
        part = Part.of(loss_fn, outputs, y)
        try:
            own, joined = slopes(part)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # maybe a loss that takes no outputs near ½, and raises anything
            if not tried:
                raise
            continue
        squares = own.square().sum(1)
        tells = squares.isfinite() & (squares > part.eps**2)
        tried.append((part, own, joined, tells))
        if not (squares <= part.eps**2).any():  # of a row that is left out there is no slope at all
            break
    return max(tried, key=lambda found: int(found[-1].sum()))


def slopes(part: Part) -> tuple[Tensor, Tensor]:
    """The gradient of each row's own loss, and of the loss of all, by the row's outputs; the largest own one is 1."""
    outputs = differentiable(part.output)
    n = len(outputs[0])
    with torch.enable_grad():
        losses = each_loss(part.loss_fn, with_tensors(part.output, outputs), part.y)
        leaves = [x for x in outputs if x.requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if losses.requires_grad:
            found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    own = by_row(
        [torch.zeros_like(x).double() if g is None else g.double() for x, g in zip(leaves, found, strict=True)], n
    )
    joined = by_row(part.loss_and_gradients[1], n)
    scale = own.abs().nan_to_num(0, 0, 0).max().clamp_min(torch.finfo(torch.float64).tiny)
    return own / scale, joined / scale


def by_row(gradients: list[Tensor], n: int) -> Tensor:
    return torch.cat([g.reshape(n, -1) for g in gradients], 1)

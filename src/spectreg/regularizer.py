"""The object in the training loop: it keeps two vectors a weight and adds λφ'(σ)·uvᵀ to the gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectreg.following import Following
from spectreg.maps.factors import Value
from spectreg.optimizers import before_steps
from spectreg.penalties import NO_SLOPE, Penalty, penalty_of
from spectreg.power_iteration.gradient import add_gradient, move, value
from spectreg.power_iteration.refusals import check_number, check_seed, refuse_gradients_by_sample
from spectreg.power_iteration.state import Group, State, Turns
from spectreg.power_iteration.strengths import Strength
from spectreg.products.named import weights_of
from spectreg.summary import Readings, flat, on_host, table
from spectreg.weights.kinds import InputSize
from spectreg.weights.patterns import Patterns
from spectreg.weights.selection import Select, Weight


class SpectralNormRegularizer(Following):
    """Spectral norm regularization: adds λ·Σ φ(σ(W)), by default λ/2·Σ σ(W)², to a loss.

    It leaves the model alone: no buffers, no hooks on modules, no changed keys. Its vectors are drawn from a private
    generator, so that every rank has the same, are iterated in float32 at least, and no step reads a value back to
    the host. Algorithm 1 of arXiv:1705.10941, as corrected in docs/paper.md.

    Args:
        model: Its weights are regularized (`spectreg.named_weights` says which); or a list of weights and of products
            (`spectreg.named_products`).
        strength: λ of Eq. (1): a number; a function of the step, such as `spectreg.schedules.Warmup`, which is called
            with the number of steps that a weight has taken before; or a mapping from name patterns (``fnmatch``, the
            first match counts) to these, in which a weight that no pattern matches has strength 0. A weight of strength
            0 is followed, for `log`, and neither it nor its gradient is touched. May be set anew between steps.
        penalty: φ: ``"square"`` (σ²/2), ``"hinge"``, ``"power"``, an object of `spectreg.penalties`, or any
            elementwise function of σ.
        map: The linear map that a weight is taken for; see `spectreg.named_weights`.
        input_size: Of convolutions, for ``map="operator"``.
        select: ``(name, weight) -> bool``: which weights to regularize; all by default.
        embeddings: Whether embedding tables count as weights.
        steps: Power steps a call. With a half, u and v are renewed in turn: each weight is read once a call.
        k: How many of the largest singular values of each block enter the penalty.
        tracked: How many of them are followed; ``k`` if None. One vector loses its way where the penalty has made the
            largest values nearly equal; more find it again (docs/use.md). With more than ``k``, all values of a block
            of at most 16 rows or columns are followed, which makes σ exact there.
        every: Act at each ``every``-th call only, with ``strength`` × ``every``.
        warmup: Power steps at the first call. 15 bring σ of a Gaussian matrix within 4 % of its true norm and cost as
            much as 15 calls; 0 is the paper.
        decoupled: W ← W − ηλφ'(σ)·uvᵀ with η of each parameter group, in place of a gradient; ``"independent"``: the
            same without η, so that no schedule of the learning rate changes it. Needs ``attach``.
        seed: Of the first vectors.

    Raises:
        ValueError: A setting that is out of range or fits no weight.

    >>> model = nn.Linear(3, 3, bias=False)
    >>> _ = nn.init.eye_(model.weight)
    >>> regularizer = SpectralNormRegularizer(model, strength=0.01)
    >>> regularizer.add_gradient()
    >>> regularizer.sigma()
    {'weight': tensor(1.)}
    >>> bool(torch.isclose(model.weight.grad.norm(), torch.tensor(0.01)))
    True
    """

    NAME = "regularizer"

    def __init__(
        self,
        model: nn.Module | Sequence[Weight],
        strength: Strength | Mapping[str, Strength],
        *,
        penalty: str | Penalty | Callable[[Tensor], Tensor] = "square",
        map: str | int | Mapping[str, str | int] = "matrix",
        input_size: InputSize | Mapping[str, InputSize] | None = None,
        select: Select | None = None,
        embeddings: bool = False,
        steps: float | int = 1,
        k: int = 1,
        tracked: int | None = None,
        every: int = 1,
        warmup: int = 15,
        decoupled: bool | Literal["independent"] = False,
        seed: int = 0,
    ) -> None:
        check_number("steps", steps, lambda x: x > 0 and 2 * x % 1 == 0, "a positive multiple of one half")
        check_number("k", k, lambda x: x >= 1 and x % 1 == 0, "a whole number from 1")
        tracked = k if tracked is None else tracked
        check_number("tracked", tracked, lambda x: x >= k and x % 1 == 0, f"a whole number from k={k}")
        check_number("every", every, lambda x: x >= 1 and x % 1 == 0, "a whole number from 1")
        check_number("warmup", warmup, lambda x: x >= 0 and x % 1 == 0, "a whole number from 0")
        check_seed(seed)
        if not (isinstance(decoupled, bool) or decoupled == "independent"):
            raise ValueError(f"decoupled is {decoupled!r}: it must be True, False or 'independent'.")
        self.weights: list[Weight] = weights_of(
            model, select=select, map=map, input_size=input_size, embeddings=embeddings
        )
        self.penalty_function, self.every, self.decoupled = penalty_of(penalty), int(every), decoupled
        self._state = State(
            self.weights,
            k=int(k),
            tracked=int(tracked),
            seed=int(seed),
            halves=int(2 * steps),
            every=self.every,
            warmup=int(warmup),
            keeps_start=self.penalty_function.target == "start",
        )
        self.strength = strength

    @property
    def strength(self) -> Strength | Mapping[str, Strength]:
        """λ, as it was set; a copy, if it is a mapping."""
        return dict(self._strength) if isinstance(self._strength, Mapping) else self._strength

    @strength.setter
    def strength(self, strength: Strength | Mapping[str, Strength]) -> None:
        patterns = Patterns("strength", strength)
        numbers = {w.name: patterns.get(w.name, 0.0) for w in self.weights}
        patterns.check_all_used(list(numbers))
        self._state.set_strengths(numbers)
        self._strength = dict(strength) if isinstance(strength, Mapping) else strength

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Take a power step and add λφ'(σ)·uvᵀ to the gradient of every weight (Algorithm 1, lines 6 to 9).

        A gradient that is None counts as zero; frozen weights are left alone. Call it after ``backward`` (and after
        unscaling and clipping), once an optimizer step.

        Raises:
            ValueError: A weight is under a parametrization, or has a sparse gradient.
            RuntimeError: The regularizer is ``decoupled`` or attached, a sharded weight is gathered, or Opacus takes
                gradients by sample and would replace what is added.
        """
        refuse_gradients_by_sample(self._state.acted_on())
        if self.decoupled:
            raise RuntimeError(f"decoupled={self.decoupled} acts on the weights when the optimizer does: use attach().")
        self._refuse_attached("leave the call out")
        for group, weights, acts in self._state.step():
            add_gradient(group, weights, self.penalty_function, acts)

    def _refuse_attached(self, way_out: str) -> None:
        if self._attachment is not None:
            raise RuntimeError(
                f"the regularizer is attached, so the optimizer's step adds this gradient: {way_out}, or detach() "
                "first."
            )

    def penalty(self) -> Float[Tensor, ""]:
        """The penalty λΣφ(σ) as a term of the loss, after a power step; its gradient is what ``add_gradient`` adds.

        Under ``no_grad``, as in validation, it is the value as of the last step, and no step is taken. On every rank of
        sharded weights it is the whole sum, and the gradient is this rank's shard of the whole one. It has no second
        derivative.

        Raises:
            RuntimeError: The regularizer is ``decoupled`` or attached, Opacus takes gradients by sample, or
                ``fully_shard`` has gathered a weight for a moment and would drop the gradient, which the backward pass
                may be the first to say.
            ValueError: The penalty has no slope in σ.
            NotImplementedError: A transform of ``torch.func`` is at work.
        """
        if self.decoupled:
            raise RuntimeError(f"decoupled={self.decoupled} does not act through the loss: use attach().")
        looking = not torch.is_grad_enabled()
        if not looking:
            refuse_gradients_by_sample(self._state.acted_on())
            self._refuse_attached("look at the value under torch.no_grad()")
        groups: Turns = (
            [(group, weights, 1 / self.every) for group, weights in self._state.trained()]
            if looking
            else self._state.step(effective=True)
        )
        terms = [
            share * value(group, weights, self.penalty_function)
            for group, weights, share in groups
            if any(group.acts())
        ]
        if not terms:  # a call that acts on nothing is a term of the loss all the same, and may be the only one
            return torch.zeros((), device=self.weights[0].tensor.device, requires_grad=not looking)
        total = torch.stack([t.to(terms[0].device) for t in terms]).sum()
        if not (looking or total.requires_grad):
            raise ValueError(NO_SLOPE)
        return total

    def attach(self, *optimizers: Any) -> "SpectralNormRegularizer":
        """Act before every ``optimizer.step()``, whoever calls it, until ``detach``.

        A gradient scaler that skips a step skips this too; fused optimizers that unscale inside the step get the
        scaled gradient. Several optimizers may hold the weights between them, and the steps of each act on what it
        holds. Of wrappers (SAM, Lookahead, Opacus, Fabric, Accelerate) the optimizer inside is found, and acted on when
        they step it.

        Raises:
            TypeError: One of these is no optimizer.
            RuntimeError: It is attached already.
            ValueError: A weight is in none of the optimizers; the step of one runs no hooks, evaluates the loss itself
                (LBFGS), maximizes, or gives ``decoupled`` no learning rate.
        """
        acted_on = self._state.acted_on()
        self._attach(
            lambda: before_steps(optimizers, self.weights, self._before_step, self.decoupled, acted_on), acted_on
        )
        return self

    def check_ranks(self, group: Any = None) -> None:
        """Compare the vectors of all ranks of ``group`` (the default one if None); every rank has to call it.

        Raises:
            RuntimeError: Names the rank that differs, and where.
        """
        from spectreg.power_iteration.sharded import check_ranks

        self.sigma()
        check_ranks({name: saved["v"] for name, saved in self._state.save()["vectors"].items()}, group)

    @torch.no_grad()
    def residual(self) -> dict[str, Tensor]:
        """How far each weight's vectors are from a singular pair of it now: ‖Wᵀu − σv‖ for u = Wv/|Wv|, σ = |Wv|.

        In the units of the weight; the largest over blocks. Costs as much as a step and changes nothing.
        """
        return self._state.by_weight(lambda group, weights: group.vectors.residuals(weights))

    @torch.no_grad()
    def stable_rank(self) -> dict[str, Tensor]:
        """‖W‖_F²/σ² of each weight, from 1 (rank one) to the rank; of maps that are blocks apart the least.

        Costs a read of every weight. NaN for ``map="operator"``, whose Frobenius norm depends on the position, and for
        products.
        """
        return self._state.by_weight(lambda group, weights: group.vectors.stable_ranks(weights))

    @torch.no_grad()
    def log(self) -> dict[str, float]:
        """``sigma/<name>``, ``residual/<name>`` and ``stable_rank/<name>`` of each weight, for a log.

        Those of `sigma`, `residual` and `stable_rank`, read back by one transfer for each device that holds weights.
        Costs a step and a read of every weight; of sharded weights every rank has to call it.
        `spectreg.alarms.alarms` says what in it is out of bounds.

        Warns:
            UserWarning: Weights have moved since the log before, but no step of an attached optimizer was seen.

        >>> layer = nn.Linear(2, 2, bias=False)
        >>> layer.weight.data = torch.diag(torch.tensor([2.0, 1.0]))
        >>> {name: round(x, 3) for name, x in SpectralNormRegularizer(layer, strength=0).log().items()}
        {'sigma/weight': 2.0, 'residual/weight': 0.0, 'stable_rank/weight': 1.25}
        """
        return log_of(self)

    def _readings(self) -> dict[str, Tensor]:
        """σ, residual and stable rank of each weight."""

        def three(group: Group, weights: list[Value]) -> list[Tensor]:
            v = group.vectors
            each = zip(v.sigmas, v.residuals(weights), v.stable_ranks(weights), strict=True)
            return [torch.stack([s.max(), residual, rank.to(s.dtype)]) for s, residual, rank in each]

        return self._state.by_weight(three)

    def _logged(self, numbers: Readings) -> dict[str, float]:
        if self._attachment is not None:
            self._attachment.check_acting(numbers, self._state.calls())
        return flat(numbers)

    @torch.no_grad()
    def summary(self) -> str:
        """A table of what is regularized and how it stands; reads its numbers back to the host.

        >>> layer = nn.Linear(3, 2)
        >>> layer.weight.data = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> print(SpectralNormRegularizer(layer, strength=0.01).summary())
        weight  shape  map        strength  σ  residual  stable rank
        weight  2 × 3  1 × 2 × 3  0.01      2  ...       1.25
        """
        return table(self._state.strengths_now(), self.every, self.weights, on_host(self._readings()))

    def __repr__(self) -> str:
        blocks = sum(w.map.blocks for w in self.weights)
        return (
            f"SpectralNormRegularizer({len(self.weights)} weights with {blocks} blocks, strength={self.strength}, "
            f"penalty={self.penalty_function}, steps={self._state.halves / 2:g}, every={self.every}"
            f"{f', decoupled={self.decoupled!r}' if self.decoupled else ''}{', attached' if self._attachment else ''})"
        )

    @torch.no_grad()
    def _before_step(
        self,
        optimizer: int,
        rates: Mapping[int, Any],
        factor: Tensor | float,
        keep: Tensor | float,
        turns: Turns | None = None,
    ) -> Turns:
        """Called by the attachment: with learning rates by parameter, the gradients' scale, and 0 to skip the step.

        An optimizer that evaluates the loss again within its step gives back the ``turns`` that it got the first time:
        a step counts once, moves weights once, and adds to every gradient.
        """
        free, again = self.decoupled == "independent", turns is not None
        turns = self._state.step(optimizer, held=rates, keep=keep) if turns is None else turns
        for group, weights, acts in turns:
            if self.decoupled and again:
                continue
            if self.decoupled:
                move(group, weights, self.penalty_function, lambda W: 1.0 if free else rates[id(W)], acts)
            else:
                add_gradient(group, weights, self.penalty_function, factor * acts)
        return turns


@torch.no_grad()
def log_of(*regularizers: SpectralNormRegularizer) -> dict[str, float]:
    """The logs of several regularizers by one transfer for all; of a weight in several of them, that of the last."""
    readings = [(r, name, reading) for r in regularizers for name, reading in r._readings().items()]
    numbers = on_host({(id(r), name): reading for r, name, reading in readings})
    log: dict[str, float] = {}
    for r in regularizers:
        log |= r._logged({name: numbers[id(r), name] for other, name, _ in readings if other is r})
    return log

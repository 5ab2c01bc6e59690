"""Scalar functions φ of a singular value, and their slopes."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Literal, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Target = float | int | Literal["start", "shape"]
Values = Float[Tensor, "*values"]

NO_SLOPE = "the penalty function has no slope in σ: a step in it, or a detach(), takes it away."


@runtime_checkable
class Penalty(Protocol):
    """A function of σ, elementwise. ``target`` reaches it as a number, or one for each σ: see `Square`."""

    @property
    def target(self) -> Target: ...

    @property
    def factor(self) -> float | int: ...

    def value(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """φ(σ)."""
        ...

    def slope(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """φ'(σ)."""
        ...


@dataclass(frozen=True)
class Square:
    """φ(σ) = (σ − t)²/2; with t = 0 the paper's (Eq. (1) of arXiv:1705.10941).

    Args:
        target: t: a number; ``"start"``, the σ that each weight began with; or ``"shape"``, √(d_out/d_in) of each
            weight (arXiv:2601.08393).
        factor: Multiplies the target.

    >>> Square(target=1.0).slope(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor([2.])
    """

    target: Target = 0.0
    factor: float | int = 1.0

    def value(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """(σ − t)²/2."""
        return (sigma - target).square() / 2

    def slope(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """σ − t."""
        return sigma - target


@dataclass(frozen=True)
class Hinge:
    """φ(σ) = max(σ − c, 0)²/2: only what is above ``target`` is pulled down. Arguments as for `Square`.

    >>> Hinge(2.0).slope(torch.tensor([1.0, 3.0]), torch.tensor(2.0))
    tensor([0., 1.])
    """

    target: Target = 1.0
    factor: float | int = 1.0

    def value(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """max(σ − c, 0)²/2."""
        return (sigma - target).relu().square() / 2

    def slope(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """max(σ − c, 0)."""
        return (sigma - target).relu()


@dataclass(frozen=True)
class Power:
    """φ(σ) = (σᵏ − 1)², which keeps σ near one from both sides (arXiv:2406.06811).

    >>> Power(2).value(torch.tensor([2.0]), torch.tensor(0.0))
    tensor([9.])
    """

    exponent: float | int = 2.0
    target: ClassVar[Target] = 0.0
    factor: ClassVar[float | int] = 1.0

    def value(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """(σᵏ − 1)²."""
        return (sigma**self.exponent - 1).square()

    def slope(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """2k(σᵏ − 1)σᵏ⁻¹."""
        return 2 * self.exponent * (sigma**self.exponent - 1) * sigma ** (self.exponent - 1)


@dataclass(frozen=True)
class Function:
    """Any elementwise function of σ; its slope is found by autograd.

    >>> Function(torch.log1p).slope(torch.tensor([1.0]), torch.tensor(0.0))
    tensor([0.5000])
    """

    function: Callable[[Tensor], Tensor]
    target: ClassVar[Target] = 0.0
    factor: ClassVar[float | int] = 1.0

    def value(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """The function itself."""
        values = self.function(sigma)
        if not isinstance(values, Tensor) or values.shape != sigma.shape:
            came = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"the penalty function made {came} of a tensor of {sigma.numel()} σ: it must be elementwise, such as "
                "lambda sigma: sigma**4. The sum over σ is taken for you."
            )
        return values

    def slope(self, sigma: Values, target: Float[Tensor, "..."]) -> Values:
        """Its derivative."""
        with torch.enable_grad():
            at = sigma.detach().requires_grad_()
            values = self.value(at, target)
            if not values.requires_grad:
                raise ValueError(NO_SLOPE)
            return torch.autograd.grad(values.sum(), at)[0]


NAMED = {"square": Square, "hinge": Hinge, "power": Power}


def penalty_of(penalty: str | Penalty | Callable[[Tensor], Tensor]) -> Penalty:
    """What the user means by ``penalty``: a name, a penalty, or a function of σ."""
    if isinstance(penalty, str):
        if penalty not in NAMED:
            raise ValueError(f"unknown penalty {penalty!r}: it is one of {', '.join(NAMED)}, or a function of σ.")
        return NAMED[penalty]()
    if isinstance(penalty, type):
        raise ValueError(f"penalty is the class {penalty.__name__}: give one of it, such as {penalty.__name__}().")
    if isinstance(penalty, Penalty):
        _check_numbers(penalty)
        return penalty
    if not callable(penalty):
        missing = [name for name in ("value", "slope", "target", "factor") if not hasattr(penalty, name)]
        if len(missing) < 4:
            raise ValueError(
                f"penalty {penalty!r} has no {' and no '.join(missing)}: an object that is a penalty has value, slope, "
                "target and factor, as Square has."
            )
        raise ValueError(f"penalty {penalty!r} is neither one of {', '.join(NAMED)} nor a function of σ.")
    return Function(penalty)


def _check_numbers(penalty: Penalty) -> None:
    target, factor, exponent = penalty.target, penalty.factor, getattr(penalty, "exponent", 1.0)
    if target not in ("start", "shape") and not (_is_number(target) and target >= 0):
        raise ValueError(
            f"target {target!r} of {penalty}: it must be a finite number, 'start' or 'shape', and not below 0, where "
            "no σ is."
        )
    if not (_is_number(factor) and factor >= 0):
        raise ValueError(f"factor of {penalty} must be a finite number from 0.")
    if not (_is_number(exponent) and exponent > 0):
        raise ValueError(f"exponent of {penalty} must be a finite number above 0.")


def _is_number(x: object) -> TypeGuard[float]:
    return isinstance(x, float | int) and not isinstance(x, bool) and isfinite(x)

"""Strengths that depend on the step: any function of it will do, and these two can be saved and put into each other."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, isfinite, pi
from numbers import Integral, Real
from typing import Any, Literal

from torch import Tensor

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Warmup:
    """Rises in a straight line: ``strength`` × 1/``steps`` at step 0, the whole of it from the ``steps``-th step on.

    Args:
        strength: A number, or another schedule.
        steps: At least 1.

    Raises:
        ValueError: ``steps`` is no whole number from 1, or ``strength`` neither a number from 0 nor a schedule.

    >>> [Warmup(0.5, steps=2)(step) for step in range(4)]
    [0.25, 0.5, 0.5, 0.5]
    """

    strength: float | int | Schedule
    steps: int

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        _check_whole("steps", self.steps, 1)

    def __call__(self, step: int) -> float:
        """λ at ``step``, counted from 0."""
        return _at(self.strength, step) * min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True)
class Decay:
    """``strength`` until step ``start``; ``final`` × ``strength`` from ``steps`` steps later on; in between it falls.

    Args:
        strength: A number, or another schedule, such as a `Warmup`.
        steps: How long it falls, at least 1.
        start: The step at which it begins to fall.
        final: The share of ``strength`` that is left at last.
        shape: Half a ``"cosine"``, or ``"linear"``.

    Raises:
        ValueError: A setting is out of range.

    >>> [Decay(1.0, steps=2, start=1, shape="linear")(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """

    strength: float | int | Schedule
    steps: int
    start: int = 0
    final: float | int = 0.0
    shape: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        _check_whole("steps", self.steps, 1)
        _check_whole("start", self.start, 0)
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f"shape is {self.shape!r}: it must be 'cosine' or 'linear'.")
        if not (_is_number(self.final) and isfinite(self.final) and self.final >= 0):
            raise ValueError(f"final is {self.final!r}: it must be a finite number from 0.")

    def __call__(self, step: int) -> float:
        """λ at ``step``, counted from 0."""
        done = min(max((step - self.start) / self.steps, 0.0), 1.0)
        left = 1.0 - done if self.shape == "linear" else (1.0 + cos(pi * done)) / 2
        return _at(self.strength, step) * (self.final + (1.0 - self.final) * left)


def _at(strength: float | int | Schedule, step: int) -> float:
    return strength(step) if callable(strength) else strength


def _is_number(x: Any) -> bool:
    return (isinstance(x, Real) and not isinstance(x, bool)) or (isinstance(x, Tensor) and x.numel() == 1)


def _check_strength(x: Any) -> None:
    if isinstance(x, type) or not (callable(x) or (_is_number(x) and isfinite(x) and x >= 0)):
        raise ValueError(f"strength is {x!r}: it must be a finite number from 0, or a schedule.")


def _check_whole(name: str, x: Any, least: int) -> None:
    if not isinstance(x, Integral) or isinstance(x, bool) or x < least:
        raise ValueError(f"{name} is {x!r}: it must be a whole number from {least}.")

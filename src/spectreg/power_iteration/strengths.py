"""λ of each weight: a number, or a function of the step."""

from collections.abc import Callable, Mapping
from numbers import Real

from spectreg.power_iteration.refusals import SMALLEST, check_strength

Strength = float | int | Callable[[int], float]


class Strengths:
    """λ of each weight by its name, times ``every``, as it acts.

    Attributes:
        zero: The weights whose strength is 0 at every step.

    Raises:
        ValueError: One is no number that float32 can hold; that of a function is asked for at step 0.

    >>> strengths = Strengths({"a": 0.5, "b": lambda step: 0.25 * step}, every=2)
    >>> strengths.at(["a", "b"], step=3), strengths.vary(["a"])
    ([1.0, 1.5], False)
    """

    def __init__(self, each: Mapping[str, Strength], every: int) -> None:
        self.each, self.every = each, every
        for name, strength in each.items():
            if isinstance(strength, type):
                kind = strength.__name__
                raise ValueError(f"strength of {name!r} is the class {kind}: give one of it, such as {kind}(…).")
            if not callable(strength):
                check_strength(f"strength of {name!r}", strength, every)
        self.at(list(each), 0)
        self.zero = {name for name, strength in each.items() if not callable(strength) and strength == 0}

    def vary(self, names: list[str]) -> bool:
        """Whether any of these depends on the step."""
        return any(callable(self.each[name]) for name in names)

    def at(self, names: list[str], step: int) -> list[float]:
        """λ × ``every`` of these at ``step``; of a function, what float32 cannot tell from 0 is 0."""
        numbers, asked = {}, set(names)
        for name, number in self.each.items():  # in the order of the model, whose first fault is named
            if name not in asked:
                continue
            if callable(number):
                value = number(step)
                number = 0.0 if isinstance(value, Real) and 0 < value * self.every < SMALLEST else value
                check_strength(f"strength of {name!r} at step {step}", number, self.every)
            numbers[name] = float(number) * self.every
        return [numbers[name] for name in names]

"""Measure: the generalization gap of a training curve (Section 4.1 of arXiv:1705.10941)."""

import math
from collections.abc import Iterable, Sequence


def generalization_gap(training: Sequence[float], test: Sequence[float], alpha: float) -> float | None:
    """The least training accuracy minus test accuracy, over the epochs whose test accuracy exceeds ``alpha``.

    Args:
        training: Accuracy after each epoch, as a share; epochs in which one is NaN are left out.
        test: The same epochs.

    Returns:
        The gap; None where no epoch exceeds ``alpha``.

    >>> round(generalization_gap([0.5, 0.8, 0.9], [0.5, 0.7, 0.75], alpha=0.6), 2)
    0.1
    >>> generalization_gap([0.5, 0.8, 0.9], [0.5, 0.7, 0.75], alpha=0.8) is None
    True
    """
    if len(training) != len(test):
        raise ValueError(f"the curves have {len(training)} and {len(test)} epochs: both must have the same.")
    gaps = (a - b for a, b in zip(training, test, strict=True) if b > alpha)
    return min((gap for gap in gaps if not math.isnan(gap)), default=None)


def common_threshold(test_curves: Iterable[Sequence[float]]) -> float:
    """The largest multiple of 0.01 that every curve exceeds in some epoch: α for a new study.

    >>> common_threshold([[0.5, 0.883], [0.6, 0.88]])
    0.87
    >>> common_threshold([[0.0], [0.5]])  # no curve exceeds zero by being zero
    -0.01
    """
    best = [max(curve, default=math.nan) for curve in test_curves]
    if not best or any(math.isnan(value) for value in best):
        raise ValueError(f"{len(best)} test curves, of which {sum(map(math.isnan, best))} empty: no threshold.")
    return (math.ceil(round(100 * min(best), 9)) - 1) / 100

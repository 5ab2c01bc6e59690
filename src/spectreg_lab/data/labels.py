"""Labels as classes 0 … n − 1: those that are so already, others by their order, names by the alphabet."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spectreg_lab.data.errors import DataError

SHOWN = 10


def integers(column: Any, where: str) -> np.ndarray:
    """A column of labels as integers or as names.

    Raises:
        DataError: they are neither, such as lists of zeros and ones.
    """
    try:
        labels = np.asarray(column)
    except ValueError:
        labels = np.empty((0, 0))
    if labels.ndim != 1:
        raise DataError(f"{where}: a label is a list, of zeros and ones perhaps: give the class as a number or a name")
    if missing := [i for i, label in enumerate(column) if label is None]:
        raise DataError(
            f"{where}: image {missing[0]} has no label, {len(missing)} of {len(column)} in all: leave those out"
        )
    if labels.dtype.kind not in "iubU":
        raise DataError(f"{where}: labels must be integers or names, got {labels.dtype}")
    return labels.astype(np.int64) if labels.dtype.kind in "ub" else labels


def as_classes(
    train: np.ndarray, test: np.ndarray, source: str, progress: Callable[[str], None], names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, int]:
    """Both splits' labels as 0 … n − 1, and n; every class is one that training images have.

    ``names`` are those of labels that are numbers, for errors.

    Raises:
        DataError: test images have a class that no training image has, or there is one class alone.
    """
    values = np.unique(train)
    if train.dtype.kind == "i" and (lowest := min(train.min(), test.min())) < 0:
        which = "train" if train.min() == lowest else "test"
        labels = train if which == "train" else test
        raise DataError(
            f"{source}: {which} labels run from {labels.min()} to {labels.max()}: a label below 0 is none; leave those "
            "images out"
        )
    if unknown := sorted(set(test.tolist()) - set(values.tolist()), key=str):
        raise DataError(f"{source}: the test images have labels that no training image has: {_listed(unknown, names)}")
    if len(values) < 2:
        raise DataError(f"{source}: all training images are of one class, {_listed(values.tolist(), names)}")
    if not np.array_equal(values, np.arange(len(values))):
        progress(f"{source}: the labels {_listed(values.tolist())} are classes 0 to {len(values) - 1}, in this order")
    return np.searchsorted(values, train), np.searchsorted(values, test), len(values)


def _listed(values: list[Any], names: Sequence[str] = ()) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(str(names[value] if names else value)[:40] for value in values[:SHOWN]) + more

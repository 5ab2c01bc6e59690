"""How the weights of a regularizer stand: as numbers for a log, and as a table."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from spectreg.maps.factors import tensors_of
from spectreg.maps.matrix import MatrixMap
from spectreg.maps.product import ProductMap
from spectreg.weights.selection import Weight

QUANTITIES = ("sigma", "residual", "stable_rank")
HEAD = ("weight", "shape", "map", "strength", "σ", "residual", "stable rank")

Key = TypeVar("Key", bound=Hashable)
Readings = dict[str, list[float]]  # by the name of the weight: a number for each of the quantities


def on_host(readings: Mapping[Key, Tensor]) -> dict[Key, list[float]]:
    """The numbers of all readings, by one transfer for each device that holds weights.

    >>> on_host({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])})
    {'a': [1.0, 2.0], 'b': [3.0, 4.0]}
    """
    by_device: dict[torch.device, dict[Key, Tensor]] = {}
    for name, reading in readings.items():
        wide = reading if reading.device.type == "mps" else reading.double()  # weights may differ in precision
        by_device.setdefault(reading.device, {})[name] = wide
    numbers: dict[Key, list[float]] = {}
    for each in by_device.values():
        numbers |= zip(each, torch.stack(list(each.values())).tolist(), strict=True)
    return {name: numbers[name] for name in readings}


def flat(numbers: Readings) -> dict[str, float]:
    """``sigma/<name>`` of every weight, then the other quantities.

    >>> list(flat({"a": [1.0, 2.0, 3.0]}))
    ['sigma/a', 'residual/a', 'stable_rank/a']
    """
    return {f"{quantity}/{name}": numbers[name][i] for i, quantity in enumerate(QUANTITIES) for name in numbers}


def table(strengths: Mapping[str, float], every: int, weights: Sequence[Weight], numbers: Readings) -> str:
    """One line a weight, in columns."""
    lines = [HEAD]
    for w in weights:
        own = [f"{x:.3g}" for x in numbers[w.name]] if w.name in numbers else ["frozen"] * len(QUANTITIES)
        shape = " · ".join(" × ".join(map(str, f.shape)) for f in tensors_of(w.tensor) if f.ndim)
        lines.append((w.name, shape, _map(w), f"{strengths[w.name] / every:g}", *own))  # type: ignore[arg-type]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _map(w: Weight) -> str:
    if not isinstance(w.map, MatrixMap | ProductMap):
        return "operator"
    size = f"{w.map.blocks} × {w.map.outputs} × {w.map.inputs}"
    return f"{size}, a product" if isinstance(w.map, ProductMap) else size

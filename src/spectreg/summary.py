"""What a regularizer does to each weight, as a table."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from spectreg.maps.matrix import MatrixMap
from spectreg.weights.selection import Weight

HEAD = ("weight", "shape", "map", "strength", "σ", "residual", "stable rank")


def table(
    strengths: Mapping[str, float],
    every: int,
    weights: Sequence[Weight],
    sigma: Mapping[str, Tensor],
    residual: Mapping[str, Tensor],
    stable_rank: Mapping[str, Tensor],
) -> str:
    """One line a weight, in columns."""
    lines = [HEAD]
    for w in weights:
        numbers = (f"{x[w.name].item():.3g}" if w.name in x else "frozen" for x in (sigma, residual, stable_rank))
        shape = " × ".join(map(str, w.tensor.shape))
        lines.append((w.name, shape, _map(w), f"{strengths[w.name] / every:g}", *numbers))  # type: ignore[arg-type]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _map(w: Weight) -> str:
    if not isinstance(w.map, MatrixMap):
        return "operator"
    return f"{w.map.blocks} × {w.map.outputs} × {w.map.inputs}"

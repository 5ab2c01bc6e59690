"""What in a log of norms calls for attention: one that grew, vectors that lag behind, a number that is not finite."""

from collections.abc import Iterator, Mapping
from math import isfinite
from numbers import Real
from typing import Any, Literal, NamedTuple


class Alarm(NamedTuple):
    """``quantity`` of ``weight`` is ``value``, beyond its ``limit``.

    ``"growth"`` is σ over σ of an earlier log, ``"residual"`` a share of σ; ``"sigma"`` is not finite, and its limit
    infinity.
    """

    weight: str
    quantity: Literal["sigma", "growth", "residual"]
    value: float
    limit: float


def alarms(
    numbers: Mapping[str, float],
    since: Mapping[str, float] | None = None,
    *,
    growth: float | int = 2.0,
    residual: float | int = 0.1,
) -> list[Alarm]:
    """The alarms in ``numbers``, a log of `SpectralNormRegularizer`; nothing is printed or read from a device.

    Args:
        since: An earlier log, such as the first or the last one. What is not in it, or was 0 then, has not grown.
        growth: By what factor σ may have grown since then.
        residual: How large ``residual``/σ may be. It is up to 0.05 for Gaussian matrices after the warm-up, and tends
            to 0 while the weight rests; far above that σ is not the norm of the weight as it is now.

    Raises:
        ValueError: ``numbers`` or ``since`` is no such log, or a limit is no number from 0.

    >>> alarms({"sigma/a": 6.0, "residual/a": 0.3}, since={"sigma/a": 2.0, "residual/a": 0.0})
    [Alarm(weight='a', quantity='growth', value=3.0, limit=2.0)]
    """
    for name, limit in (("growth", growth), ("residual", residual)):
        if isinstance(limit, bool) or not isinstance(limit, Real) or not limit >= 0:
            raise ValueError(f"{name} is {limit!r}: it must be a number from 0 (infinity for no such alarm).")
    sigma, before = _sigmas("numbers", numbers), {} if since is None else _sigmas("since", since)
    return [a for name in sigma for a in _of(name, numbers, sigma[name], before.get(name, 0.0), growth, residual)]


def _of(
    name: str, numbers: Mapping[str, float], sigma: float, before: float, growth: float, residual: float
) -> Iterator[Alarm]:
    if not isfinite(sigma):
        yield Alarm(name, "sigma", sigma, float("inf"))
        return
    if before > 0 and isfinite(before) and sigma / before > growth:
        yield Alarm(name, "growth", sigma / before, growth)
    off = numbers[f"residual/{name}"]
    if not off <= residual * sigma:
        yield Alarm(name, "residual", off / sigma if sigma else float("inf"), residual)


def _sigmas(argument: str, log: Any) -> dict[str, float]:
    of = {key.removeprefix("sigma/"): value for key, value in log.items() if key.startswith("sigma/")}
    if not of or any(f"residual/{name}" not in log for name in of):
        raise ValueError(f"{argument} must be what log() of a regularizer returned, with sigma/… and residual/….")
    return of

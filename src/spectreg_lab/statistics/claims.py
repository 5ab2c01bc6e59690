"""What a claim compares: rows of a table, each a kind of comparison with its methods, measure and direction.

Every comparison has two sides of a number a seed; its claim says that the first is the greater.
"""

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields

import pandas as pd

from spectreg_lab.statistics.paired import ANY, Unit
from spectreg_lab.statistics.quantities import Numbers, correlations, fisher, points, unit

BASELINES = ("vanilla", "decay", "adversarial")
METHODS = (*BASELINES, "spectral")
# "except for the DenseNet model on the STL-10 dataset", Section 4.1; and Appendix B names VGGNet and NIN alone where
# the gradient norm on training data does not predict the gap.
STL10 = "densenet22/stl10"


@dataclass(frozen=True)
class Comparison:
    """One instance of a claim: in which setting, of what, and what either side has by seed.

    ``pair`` names the cell and the two methods where single comparisons are corrected together with Table 1's.
    """

    setting: str
    what: str
    first: pd.Series
    second: pd.Series
    bounds: tuple[float, float] = ANY
    unit: Unit = ""
    pair: tuple[str, str, frozenset[str]] | None = None


def _constant(like: pd.Series, value: float) -> pd.Series:
    return pd.Series(value, index=like.index, dtype=float)


@dataclass(frozen=True)
class Above:
    """Each of ``higher`` has more of ``measure`` than each of ``lower``; ``regimes`` are 0, the small batch, and −1."""

    measure: str
    higher: tuple[str, ...]
    lower: tuple[str, ...]
    regimes: tuple[int, ...] = (0, -1)
    margin: float = 0.0

    def comparisons(self, numbers: Numbers) -> Iterator[Comparison]:
        """In every setting and regime, for every pair of methods."""
        less = f" + {self.margin:g}" if self.margin else ""
        for setting in numbers.settings:
            for regime in dict.fromkeys(numbers.regimes[place] for place in self._places(numbers)):
                for above in self.higher:
                    for below in (method for method in self.lower if method != above):
                        sides = [numbers.of(setting, regime, name, self.measure) for name in (above, below)]
                        what = f"{above} − {below}{less}, {regime} batch"
                        pair = None if self.margin else (regime, self.measure, frozenset((above, below)))
                        yield Comparison(setting, what, sides[0] + self.margin, sides[1], ANY, unit(self.measure), pair)

    def _places(self, numbers: Numbers) -> tuple[int, ...]:
        """Of a study with one regime, that is the small one."""
        return self.regimes if len(numbers.regimes) > 1 else tuple(place for place in self.regimes if place == 0)


@dataclass(frozen=True)
class WithBatch:
    """``measure`` changes from the small batch to the large one, for each method: it rises (1) or falls (−1)."""

    measure: str
    methods: tuple[str, ...]
    sign: int

    def comparisons(self, numbers: Numbers) -> Iterator[Comparison]:
        """In every setting, for every method."""
        order = numbers.regimes[:: len(numbers.regimes) - 1][:: -self.sign] if len(numbers.regimes) > 1 else ()
        for setting in numbers.settings if order else ():
            for method in self.methods:
                first, second = (numbers.of(setting, regime, method, self.measure) for regime in order)
                what = f"{method}, {order[0]} − {order[1]} batch"
                yield Comparison(setting, what, first, second, unit=unit(self.measure))


@dataclass(frozen=True)
class MoreWithBatch:
    """That change is greater for each of ``methods`` than for ``than``."""

    measure: str
    methods: tuple[str, ...]
    than: str
    sign: int

    def comparisons(self, numbers: Numbers) -> Iterator[Comparison]:
        """In every setting, for every method."""
        for setting in numbers.settings if len(numbers.regimes) > 1 else ():
            for method in self.methods:
                own, other = (self.sign * numbers.change(setting, name, self.measure) for name in (method, self.than))
                what = f"change of {method} − that of {self.than}"
                yield Comparison(setting, what, own, other, unit=unit(self.measure))


@dataclass(frozen=True)
class Exceeds:
    """``measure`` is greater than ``least`` (``sign`` −1: smaller) for each method."""

    measure: str
    methods: tuple[str, ...]
    least: float
    sign: int = 1
    bounds: tuple[float, float] = ANY

    def comparisons(self, numbers: Numbers) -> Iterator[Comparison]:
        """In every setting and regime, for every method."""
        low, high = sorted(self.sign * (bound - self.least) for bound in self.bounds)
        for setting in numbers.settings:
            for regime in numbers.regimes:
                for method in self.methods:
                    own = numbers.of(setting, regime, method, self.measure)
                    first, second = (own, _constant(own, self.least))[:: self.sign]
                    what = " − ".join((method, f"{self.least:g}")[:: self.sign]) if self.least else method
                    what, of = f"{what}, {regime} batch", unit(self.measure)
                    yield Comparison(setting, what, first, second, (low, high), of)


@dataclass(frozen=True)
class Correlates:
    """Through training ``measure``, a column of Fisher's z, is positive (``sign`` −1: negative), mean over methods.

    With ``more_than`` it is greater than that other column is.
    """

    measure: str
    sign: int = 1
    more_than: str | None = None

    def comparisons(self, numbers: Numbers) -> Iterator[Comparison]:
        """In every setting and regime."""
        for setting in numbers.settings:
            for regime in numbers.regimes:
                first, most = self._mean(numbers, setting, regime, self.measure)
                if self.more_than is None:
                    what, second = f"correlation, {regime} batch", _constant(first, 0.0)
                    yield Comparison(setting, what, self.sign * first, second, (-most, most), "correlation")
                else:
                    what = f"difference of Fisher's z, {regime} batch"
                    second, other = self._mean(numbers, setting, regime, self.more_than)
                    bounds = (-most - other, most + other)
                    yield Comparison(setting, what, self.sign * first, self.sign * second, bounds)

    @staticmethod
    def _mean(numbers: Numbers, setting: str, regime: str, column: str) -> tuple[pd.Series, float]:
        """The mean over methods, by seed, and the most that it can be: z of a correlation of 1, of so many epochs."""
        if not numbers.methods:
            return pd.Series(dtype=float), math.inf
        z, counts = (
            pd.concat([numbers.of(setting, regime, method, name) for method in numbers.methods], axis=1)
            for name in (column, points(column))
        )
        most = counts.where(z.notna().to_numpy()).map(lambda n: fisher(1.0, n), na_action="ignore").mean(axis=1).max()
        return z.mean(axis=1), math.inf if math.isnan(most) else float(most)


@dataclass(frozen=True)
class Nearer:
    """Each of ``methods`` is nearer in ``measure`` to the method ``to`` than to the method ``than``."""

    measure: str
    methods: tuple[str, ...]
    to: str
    than: str

    def comparisons(self, numbers: Numbers) -> Iterator[Comparison]:
        """In every setting and regime, for every method."""
        for setting in numbers.settings:
            for regime in numbers.regimes:
                for method in self.methods:
                    own = numbers.of(setting, regime, method, self.measure)
                    far, near = (
                        (own - numbers.of(setting, regime, name, self.measure)).abs() for name in (self.than, self.to)
                    )
                    what = f"{method}: distance from {self.than} − that from {self.to}, {regime} batch"
                    yield Comparison(setting, what, far, near)


@dataclass(frozen=True)
class Predicts:
    """Over the methods and regimes of a seed, ``first`` ranks the gap better than ``second`` does, up or down."""

    first: str
    second: str

    def comparisons(self, numbers: Numbers) -> Iterator[Comparison]:
        """In every setting: Fisher's z of either correlation without its sign."""
        for setting in numbers.settings:
            first, second = (correlations(numbers.runs, setting, name).z.abs() for name in (self.first, self.second))
            yield Comparison(setting, "difference of Fisher's z of |rank correlation|", first, second)


Kind = Above | WithBatch | MoreWithBatch | Exceeds | Correlates | Nearer | Predicts


@dataclass(frozen=True)
class Claim:
    """A sentence and what it says about runs.

    Attributes:
        section: Of the paper, or "ours" for a claim that it does not make.
        says: What must hold; with several, one of them is enough, and each is judged at its share of the level.
        but_for_stl10: Not claimed of the setting that stands for the paper's DenseNet on STL-10.
    """

    section: str
    sentence: str
    says: tuple[Kind, ...]
    but_for_stl10: bool = False

    def methods(self) -> set[str]:
        """The methods that it is about; empty where it is about those of the study, whichever they are."""
        values = [getattr(kind, field.name) for kind in self.says for field in fields(kind)]
        words = [word for value in values for word in (value if isinstance(value, tuple) else (value,))]
        return {word for word in words if word in METHODS}

    def comparisons(self, numbers: Numbers) -> list[list[Comparison]]:
        """The comparisons of each alternative, in the settings that the claim is about."""
        left_out = {name for name, row in numbers.paper.items() if self.but_for_stl10 and row == STL10}
        return [[c for c in kind.comparisons(numbers) if c.setting not in left_out] for kind in self.says]


def described(claim: Claim) -> list[str]:
    """What the claim says, each alternative as the row that it is, without what is left at its default.

    >>> described(Claim("4.1", "…", (Above("test_accuracy", ("spectral",), ("decay",), (-1,)),)))
    ["Above('test_accuracy', ('spectral',), ('decay',), regimes=(-1,))"]
    """
    return [_row(kind) for kind in claim.says]


def _row(kind: Kind) -> str:
    given = [(f, getattr(kind, f.name)) for f in fields(kind)]
    words = [repr(value) if f.default is MISSING else f"{f.name}={value!r}" for f, value in given if value != f.default]
    return f"{type(kind).__name__}({', '.join(words)})"

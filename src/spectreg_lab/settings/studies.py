"""A study file: settings × methods × regimes × seeds, each point of it a run."""

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from spectreg_lab.settings import shipped
from spectreg_lab.settings.config import (
    Adversarial,
    Config,
    Data,
    Epochs,
    Fraction,
    Measuring,
    Method,
    Model,
    Number,
    Place,
    Positive,
    Precision,
    Rate,
    Seed,
    Setting,
    Strength,
    Switch,
    Vanilla,
    check_compiles,
)
from spectreg_lab.settings.faults import NAME, explain, line

MOST = 100_000  # runs of a study
LARGEST = 10**6  # bytes of a study file


class StudyError(Exception):
    """A study file that cannot be used; the message names the file and the field."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What is wrong with a study is said with the file that it is in."""
    try:
        yield
    except StudyError as error:
        raise StudyError(f"study file {path}: {error}") from error


class Regime(Setting):
    """A batch size with a name."""

    batch_size: Positive


Name = Annotated[str, Field(max_length=100, pattern=NAME)]
Title = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Threshold = Annotated[Number, Field(ge=0, lt=1)]
Rates = Annotated[tuple[Rate, ...], Field(min_length=1, max_length=1000)]


class Case(Setting):
    """A network on a data set, with a learning rate for each regime."""

    title: Title | None = None
    model: Model
    data: Data = Data()
    learning_rate: dict[Name, Rate] = Field({}, description="by regime")
    searched_rates: dict[Name, Rates] = Field(
        {}, description="by regime: those that a search tries here, where they are not the ones for all settings"
    )
    batch_size: dict[Name, Positive] = Field({}, description="by regime, where it differs from the study's")
    epochs: Epochs | None = Field(None, description="where they differ from the study's")
    micro_batch: Positive | None = Field(None, description="where it differs from the study's")
    alpha: dict[Name, Threshold] | None = Field(None, description="thresholds of the generalization gap, by regime")
    paper: Literal["vgg/cifar10", "nin/cifar100", "densenet40/cifar100", "densenet22/stl10"] | None = Field(
        None, description="the rows of the paper's Table 1 to set beside, as model/dataset"
    )


class Training(Setting):
    """What all runs of a study share."""

    momentum: Fraction = 0.9
    micro_batch: Positive = 1024
    precision: Precision = "32-true"
    evaluate_every: Positive = 1
    compile: Switch = False


class Search(Setting):
    """What a search tries for every setting and regime: each learning rate with each strength of each method.

    ``strength`` is the field of that name, for adversarial training ``epsilon``; a method that is not listed keeps its
    own. Runs are tested on the fraction ``validation`` of the training images, never on the test images.
    """

    learning_rate: dict[Name, Rates]
    strength: dict[Name, Annotated[tuple[Strength, ...], Field(min_length=1, max_length=1000)]] = Field(
        {}, description="by method"
    )
    validation: Fraction = Field(0.2, gt=0)


class Study(Setting):
    """The content of a study file."""

    name: Name
    title: Title = ""
    epochs: Epochs
    seeds: tuple[Seed, ...] = Field(min_length=1, max_length=10_000)
    regimes: dict[Name, Regime] = Field(min_length=1, max_length=100)
    settings: dict[Name, Case] = Field(min_length=1, max_length=1000)
    methods: dict[Name, Method] = Field(min_length=1, max_length=1000)
    training: Training = Training()
    measure: Measuring | None = None
    search: Search | None = Field(None, description="makes the study one for `spectreg search`")
    registered: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")] | None = Field(
        None, description="the commit that fixed the claims, their directions and the rule before the first run"
    )
    searched: tuple[Place, ...] = Field(
        (), description="the search.csv of each search that chose the settings, seen from the study file"
    )

    @model_validator(mode="before")
    @classmethod
    def _a_method_is_named_by_its_key(cls, study: Any) -> Any:
        """``[methods.decay]`` needs no ``name``; ``[methods.strong-decay]`` says ``name = "decay"``."""
        if isinstance(study, dict) and isinstance(study.get("methods"), dict):
            methods = {k: {"name": k, **m} if isinstance(m, dict) else m for k, m in study["methods"].items()}
            return {**study, "methods": methods}
        return study

    @model_validator(mode="after")
    def _names_agree(self) -> "Study":
        rates: dict[str, Mapping[str, object]] = {
            f"settings.{name}.learning_rate": case.learning_rate for name, case in self.settings.items()
        }
        if self.search is not None:
            rates = {"search.learning_rate": self.search.learning_rate}
            unknown = sorted(set(self.search.strength) - set(self.methods))
            if unknown:
                raise ValueError(f"search.strength is given for {unknown}, but the methods are {sorted(self.methods)}")
        for name, case in self.settings.items():
            for field in ("batch_size", "searched_rates", "alpha"):
                if unknown := sorted(set(getattr(case, field) or {}) - set(self.regimes)):
                    raise ValueError(
                        f"settings.{name}.{field} is given for {unknown}, but the regimes are {sorted(self.regimes)}"
                    )
            if case.searched_rates and self.search is None:
                raise ValueError(f"settings.{name}.searched_rates is for a study with a [search] table")
        for where, by_regime in rates.items():
            if set(by_regime) != set(self.regimes):
                raise ValueError(
                    f"{where} is given for {sorted(by_regime)}, but the regimes are {sorted(self.regimes)}"
                )
        return self

    @model_validator(mode="after")
    def _compiles(self) -> "Study":
        for method in self.methods.values():
            check_compiles(self.training.compile, method)
        return self

    @model_validator(mode="after")
    def _no_run_is_there_twice(self) -> "Study":
        if twice := [seed for seed, times in Counter(self.seeds).items() if times > 1]:
            raise ValueError(f"seeds: {twice[0]} is there more than once")
        for field in ("regimes", "settings", "methods"):
            _check_alike(field, getattr(self, field))
        runs = len(self.seeds) * self._runs_a_seed()
        if runs > MOST:
            raise ValueError(f"seeds × regimes × settings × methods are {runs} runs: a study has at most {MOST}")
        seen: dict[tuple[str, Config], Point] = {}
        for point in self.model_copy(update={"seeds": self.seeds[:1]}).points():
            kind = point.method if self.search else ""  # a search may come across another method's strength
            other = seen.setdefault((kind, point.config), point)
            if other is not point:
                raise ValueError(_same_runs(other, point))
        return self

    def _runs_a_seed(self) -> int:
        rates = sum(len(self._rates(case, regime)) for case in self.settings.values() for regime in self.regimes)
        return rates * sum(len(self._strengths(method)) for method in self.methods)

    def points(self) -> list["Point"]:
        """Every run of the study: all of the first seed first, so that an unfinished study compares all methods."""
        grid = product(self.seeds, self.settings.items(), self.regimes.items(), self.methods.items())
        return [
            Point(setting, regime, method, seed, self._config(case, method, regime, seed, rate, strength))
            for seed, (setting, case), (regime, _), (method, _) in grid
            for rate in self._rates(case, regime)
            for strength in self._strengths(method)
        ]

    def _strengths(self, method: str) -> tuple[float | None, ...]:
        return self.search.strength.get(method, (None,)) if self.search else (None,)

    def _rates(self, case: Case, regime: str) -> tuple[float, ...]:
        if self.search is None:
            return (case.learning_rate[regime],)
        return case.searched_rates.get(regime, self.search.learning_rate[regime])

    def _config(self, case: Case, method: str, regime: str, seed: int, rate: float, strength: float | None) -> Config:
        setting = self.methods[method]
        if strength is not None:
            setting = setting.model_copy(update={strength_field(setting): strength})
        data = case.data.model_copy(update={"validation": self.search.validation}) if self.search else case.data
        return Config(
            model=case.model,
            data=data,
            method=setting,
            batch_size=case.batch_size.get(regime, self.regimes[regime].batch_size),
            learning_rate=rate,
            epochs=case.epochs or self.epochs,
            seed=seed,
            measure=None if self.search else self.measure,
            **{**self.training.model_dump(), "micro_batch": case.micro_batch or self.training.micro_batch},
        )


def _check_alike(field: str, named: Mapping[str, object]) -> None:
    """Names are names of files, too, and some file systems do not tell upper from lower case."""
    lower: dict[str, str] = {}
    for name in named:
        if (other := lower.setdefault(name.lower(), name)) != name:
            raise ValueError(f"{field}.{other} and {field}.{name} differ in upper and lower case only: rename one")


def _same_runs(one: "Point", other: "Point") -> str:
    for kind in ("setting", "regime", "method"):
        if getattr(one, kind) != getattr(other, kind):
            first, second = (f"{kind}s.{getattr(point, kind)}" for point in (one, other))
            return f"{first} and {second} are the same runs: leave one of them out"
    return f"search: {one} is there twice with the same rate and strength: leave one of them out"


@dataclass(frozen=True)
class Selection:
    """Which runs of a study are meant; an empty list means all."""

    setting: list[str] | None = None
    regime: list[str] | None = None
    method: list[str] | None = None
    seed: list[int] | None = None

    def of(self, study: Study) -> list["Point"]:
        """The runs of ``study`` that are meant.

        Raises:
            StudyError: the study has no setting, regime, method or seed of that name.
        """
        points = study.points()
        for name in ("setting", "regime", "method", "seed"):
            asked, known = getattr(self, name), list(dict.fromkeys(getattr(point, name) for point in points))
            if not asked:
                continue
            if unknown := [word for word in asked if word not in known]:
                raise StudyError(_no_such(study, name, str(unknown[0]), [str(word) for word in known]))
            points = [point for point in points if getattr(point, name) in asked]
        return points


def _no_such(study: Study, kind: str, word: str, known: list[str]) -> str:
    near = get_close_matches(word, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return f"the study {study.name!r} has no {kind} {word!r}{hint} known: {', '.join(known)}"


def strength_field(method: Method) -> str:
    """The field that says how strongly a method acts."""
    if isinstance(method, Vanilla):
        raise StudyError("search.strength: vanilla has no strength to search")
    return "epsilon" if isinstance(method, Adversarial) else "strength"


@dataclass(frozen=True)
class Point:
    """One run of a study and what the study calls it."""

    setting: str
    regime: str
    method: str
    seed: int
    config: Config

    def label(self) -> dict[str, Any]:
        """As the study folder records it."""
        return {
            "setting": self.setting,
            "regime": self.regime,
            "method": self.method,
            "seed": self.seed,
            "run": self.config.name,
        }

    def __str__(self) -> str:
        return f"{self.setting} {self.regime} {self.method} seed {self.seed}"


def read_study(path: Path, precision: str | None = None, compile: bool = False) -> Study:
    """Read and check a study file.

    Args:
        precision: Instead of the one in the file.
        compile: Compile the networks, whatever the file says.

    Raises:
        StudyError: there is no such file, it is not TOML, or a field is unknown or wrong; the message says which.
    """
    content = _toml(path)
    replaced: dict[str, str | bool] = {} if precision is None else {"precision": precision}
    replaced |= {"compile": True} if compile else {}
    if replaced and isinstance(training := content.get("training", {}), dict):
        content["training"] = {**training, **replaced}
    with naming(path):
        try:
            study = Study.model_validate(content)
        except ValidationError as error:
            raise StudyError("; ".join(explain(error, Study))) from None
        for table in study.searched:
            if not (path.parent / table).is_file():
                raise StudyError(f"searched: there is no file {table}; `spectreg search` writes one")
        return study


def _toml(path: Path) -> dict[str, Any]:
    try:
        if not path.exists():
            known = {name: name for name in shipped.studies()} | {p.stem: str(p) for p in path.parent.glob("*.toml")}
            near = get_close_matches(path.stem, known, n=1)
            hint = f"did you mean {known[near[0]]}?" if near else "`spectreg reproduce --list` names some"
            raise StudyError(f"study file {path} does not exist: {hint}")
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise StudyError(f"study file {path} is no file of at most {LARGEST} bytes")
        return tomllib.loads(path.read_text("utf-8-sig"))
    except RecursionError:
        raise StudyError(f"study file {path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:  # of TOML, of UTF-8, and of integers with thousands of digits
        raise StudyError(f"study file {path} cannot be read: {line(str(error))}") from None

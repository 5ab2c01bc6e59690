"""A study file: settings × methods × regimes × seeds, each point of it a run."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from spectreg_lab.settings.config import (
    Adversarial,
    Config,
    Data,
    Measuring,
    Method,
    Model,
    Positive,
    Precision,
    Setting,
    Vanilla,
)


class StudyError(Exception):
    """A study file that cannot be used; the message names the file and the field."""


class Regime(Setting):
    """A batch size with a name."""

    batch_size: Positive


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Case(Setting):
    """A network on a data set, with a learning rate for each regime."""

    title: str | None = None
    model: Model
    data: Data = Data()
    learning_rate: dict[str, Rate] = Field({}, description="by regime")
    searched_rates: dict[str, tuple[Rate, ...]] = Field(
        {}, description="by regime: those that a search tries here, where they are not the ones for all settings"
    )
    batch_size: dict[str, Positive] = Field({}, description="by regime, where it differs from the study's")
    epochs: Positive | None = Field(None, description="where they differ from the study's")
    micro_batch: Positive | None = Field(None, description="where it differs from the study's")
    alpha: dict[str, float] | None = Field(None, description="thresholds of the generalization gap, by regime")
    paper: str | None = Field(None, description="the rows of the paper's Table 1 to set beside, as model/dataset")


class Training(Setting):
    """What all runs of a study share."""

    momentum: float = Field(0.9, ge=0, lt=1)
    micro_batch: Positive = 1024
    precision: Precision = "32-true"
    evaluate_every: Positive = 1


class Search(Setting):
    """What a search tries for every setting and regime: each learning rate with each strength of each method.

    ``strength`` is the field of that name, for adversarial training ``epsilon``; a method that is not listed keeps its
    own. Runs are tested on the fraction ``validation`` of the training images, never on the test images.
    """

    learning_rate: dict[str, tuple[Rate, ...]]
    strength: dict[str, tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...]] = Field(
        {}, description="by method"
    )
    validation: float = Field(0.2, gt=0, lt=1)


class Study(Setting):
    """The content of a study file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str = ""
    epochs: Positive
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    regimes: dict[str, Regime] = Field(min_length=1)
    settings: dict[str, Case] = Field(min_length=1)
    methods: dict[str, Method] = Field(min_length=1)
    training: Training = Training()
    measure: Measuring | None = None
    search: Search | None = Field(None, description="makes the study one for `spectreg search`")
    registered: str | None = Field(
        None, description="the commit that fixed the claims, their directions and the rule before the first run"
    )
    searched: tuple[str, ...] = Field(
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
            for field in ("batch_size", "searched_rates"):
                if unknown := sorted(set(getattr(case, field)) - set(self.regimes)):
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

    def points(self) -> list["Point"]:
        """Every run of the study: all of the first seed first, so that an unfinished study compares all methods."""
        grid = product(self.seeds, self.settings.items(), self.regimes.items(), self.methods.items())
        return [
            Point(setting, regime, method, seed, self._config(case, method, regime, seed, rate, strength))
            for seed, (setting, case), (regime, _), (method, _) in grid
            for rate in self._rates(case, regime)
            for strength in (self.search.strength.get(method, (None,)) if self.search else (None,))
        ]

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


def read_study(path: Path, precision: str | None = None) -> Study:
    """Read and check a study file.

    Args:
        precision: Instead of the one in the file.

    Raises:
        StudyError: there is no such file, it is not TOML, or a field is unknown or wrong; the message says which.
    """
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        near = get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.toml")], n=1)
        hint = f": did you mean {path.with_name(near[0] + '.toml')}?" if near else ""
        raise StudyError(f"study file {path} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StudyError(f"study file {path} cannot be read: {error}") from None
    if precision is not None and isinstance(training := content.get("training", {}), dict):
        content["training"] = {**training, "precision": precision}
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise StudyError(f"study file {path}: " + "; ".join(explain(error, Study))) from None
    for table in study.searched:
        if not (path.parent / table).is_file():
            raise StudyError(f"study file {path}: searched: there is no file {table}; `spectreg search` writes one")
    return study


def explain(error: ValidationError, root: type[Setting]) -> list[str]:
    """One line for each fault: the field, what is wrong, and the nearest known name for an unknown one."""
    return [_fault(fault, root) for fault in error.errors(include_url=False)]


def _fault(fault: Any, root: type[Setting]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(str(fault['loc'][-1]), _known_keys(root))}"
    if fault["type"] == "union_tag_invalid":
        known = [name.strip(" '") for name in fault["ctx"]["expected_tags"].split(",")]
        return f"{where}: unknown name {fault['ctx']['tag']!r}{_nearest(fault['ctx']['tag'], known)}"
    given = "" if fault["type"] in ("missing", "value_error") else f", got {fault['input']!r}"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}{given}".removeprefix(": ")


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def _known_keys(root: type[Setting]) -> list[str]:
    schema = TypeAdapter(root).json_schema()
    groups = [schema, *schema.get("$defs", {}).values()]
    return sorted({key for group in groups for key in group.get("properties", {})})

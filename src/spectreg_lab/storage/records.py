"""The shape of every JSON record of a run and of a study, checked when it is read."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Number = float | None
Scalar = str | float | bool | None


def _folder(name: str) -> str:
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\"):
        raise ValueError("not the name of a folder")
    return name


RunName = Annotated[str, AfterValidator(_folder)]


class Record(BaseModel):
    """Keys that are known have their types; others may be there, of this version or of a later one."""

    model_config = ConfigDict(strict=True, extra="allow")


class Eigenvalue(Record):
    """A Hessian eigenvalue."""

    value: Number
    residual: Number = None


class Jacobian(Record):
    """The local norms, and the bound that the layers give."""

    norms: list[float]
    converged: bool | None = None
    bound: Number = None
    layers: dict[str, float] | None = None


class Perturbed(Record):
    """The outputs under perturbations of one length."""

    radius: float
    accuracy: Number
    loss: Number
    ratio: Number


class Measures(Record):
    """What is measured of a network, ``None`` or absent where it was not."""

    input_gradient: dict[str, Number] | None = None
    hessian: dict[str, Eigenvalue | None] | None = None
    jacobian: Jacobian | None = None
    perturbation: dict[str, list[Perturbed]] | None = None
    spectra: dict[str, Annotated[list[float], Field(min_length=1)]] | None = None
    taken_with: dict[str, Any] | None = None


class Line(Measures):
    """The metrics of an epoch."""

    epoch: int
    train_loss: Number = None
    train_accuracy: Number = None
    test_loss: Number = None
    test_accuracy: Number = None
    objective: Number = None
    learning_rate: Number = None
    seconds: Number = None
    sigma: dict[str, float] | None = None


class Outcome(Record):
    """How a run ended."""

    status: Literal["finished", "failed"]
    error: str | None = None


class StudyData(Record):
    """The images of a setting."""

    name: str = "digits"


class StudyRegime(Record):
    """A batch size with a name."""

    batch_size: int | None = None


class StudyCase(Record):
    """A setting of a study."""

    title: str | None = None
    model: dict[str, Any] | None = None
    data: StudyData | None = None
    learning_rate: dict[str, Number] | None = None
    batch_size: dict[str, int] | None = None
    epochs: int | None = None
    alpha: dict[str, Number] | None = None
    paper: str | None = None


class StudyContent(Record):
    """A study file as data, or the part of it that somebody has written."""

    name: str
    title: str = ""
    epochs: int = 0
    regimes: dict[str, StudyRegime] | None = None
    settings: dict[str, StudyCase] | None = None
    methods: dict[str, dict[str, Scalar]] | None = None


class WholeStudy(StudyContent):
    """What a report needs of it."""

    regimes: dict[str, StudyRegime]
    settings: dict[str, StudyCase]
    methods: dict[str, dict[str, Scalar]]


class Point(BaseModel):
    """A run of a study."""

    model_config = ConfigDict(strict=True, extra="forbid")
    setting: str
    regime: str
    method: str
    seed: int
    run: RunName


class StudyFile(Record):
    """The record of a study."""

    command: str
    study: StudyContent
    points: list[Point]


class StudyRecorded(StudyContent):
    """A study as it is read from its folder."""

    command: str


class Archive(Record):
    """The first line of an exported study."""

    format: int
    study: StudyRecorded
    search: str | None


class ArchivedRun(BaseModel):
    """Any other line of it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    setting: str
    regime: str
    method: str
    seed: int
    folder: RunName
    status: Literal["finished", "failed", "unfinished", "missing"]
    error: str | None
    config: dict[str, Any]
    versions: dict[str, Any]
    metrics: list[Line]
    measures: Measures


def fault(kind: type[BaseModel], content: Any) -> str | None:
    """What is wrong with ``content`` as a record of that kind, in a few words; None where nothing is."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        return first(error)
    return None


def first(error: ValidationError) -> str:
    """The first of the faults: where it is, and what."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"has no {where}" if fault["type"] == "missing" else f"has a wrong {where or 'content'} ({fault['msg']})"

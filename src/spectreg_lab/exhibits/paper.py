"""The paper's own numbers, and when ours may be compared with them."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from spectreg_lab.config import NIN, VGG, DenseNet, Setting
from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.frames import select
from spectreg_lab.store import StudyRecord

MODELS: dict[str, Setting] = {
    "vgg": VGG.model_validate({}),
    "nin": NIN.model_validate({}),
    "densenet40": DenseNet.model_validate({"depth": 40}),
    "densenet22": DenseNet.model_validate({"depth": 22}),
}
BATCH_SIZES = (64, 4096)  # the paper's two regimes
SOURCE = "Table 1 of arXiv:1705.10941"


@dataclass(frozen=True)
class PaperRow:
    """The paper's values by method, and in what our runs of that row are not the paper's."""

    values: dict[str, float]
    differing: tuple[str, ...] = ()


@cache
def table1() -> pd.DataFrame:
    """Table 1 of arXiv:1705.10941 as printed: a row for each model, data set, batch size and metric."""
    with (files("spectreg_lab") / "table1.csv").open() as file:
        return pd.read_csv(file)


def row(study: StudyRecord, setting: str, regime: str, metric: str) -> PaperRow:
    """The paper's values to set beside one of ours: those of its regime of the same place; none where not asked for."""
    model, _, dataset = (study.study["settings"][setting].get("paper") or "").partition("/")
    batch_size = BATCH_SIZES[min(list(study.study["regimes"]).index(regime), 1)]
    rows = select(table1(), model=model, dataset=dataset, batch_size=batch_size, metric=metric)
    if rows.empty:
        return PaperRow({})
    values = {method: float(rows[method].iloc[0]) for method in study.study["methods"] if method in rows}
    configs = [run.config for run in study.runs if (run.setting, run.regime) == (setting, regime) and run.config]
    return PaperRow(values, differences(configs[0], model, dataset, batch_size) if configs else ())


def beside(study: StudyRecord) -> StudyRecord:
    """The study with the paper's numbers asked for in every setting that has one of its networks and data sets."""
    settings = {
        name: described | {"paper": described.get("paper") or _same_setting(study, name)}
        for name, described in study.study["settings"].items()
    }
    return replace(study, study=study.study | {"settings": settings, "against": "paper"})


def _same_setting(study: StudyRecord, setting: str) -> str | None:
    config = next((run.config for run in study.runs if run.setting == setting and run.config), None)
    rows = table1()[["model", "dataset"]].drop_duplicates().itertuples(index=False)
    return next((f"{m}/{d}" for m, d in rows if config and not differences(config, m, d, config["batch_size"])), None)


def differences(config: dict[str, Any], model: str, dataset: str, batch_size: int) -> tuple[str, ...]:
    """In what a run's setting is not the paper's; its numbers are comparable only where this is empty."""
    data = config["data"]
    same = {
        "data": data["name"].rsplit("/", 1)[-1] == dataset,
        "number of images": not any(data.get(key) for key in ("train_size", "test_size", "validation", "classes")),
        "batch size": config["batch_size"] == batch_size,
        "image size": not data.get("shrink"),
        "network": model in MODELS and config["model"] == MODELS[model].model_dump(mode="json"),
    }
    return tuple(name for name, alike in same.items() if not alike)


def notes(study: StudyRecord) -> list[str]:
    """Sentences that say whose values stand beside ours, which are not comparable and why, and what has none."""
    keys = {name: described.get("paper") for name, described in study.study["settings"].items()}
    titles = {name: labels.setting(study, name) for name in keys}
    differing = {name: _differing(study, name) for name, key in keys.items() if key}
    said = [f"“paper”: {SOURCE}."] if differing else []
    if not_comparable := [f"{titles[name]} ({', '.join(found)})" for name, found in differing.items() if found]:
        said.append(f"† Not comparable with ours, because these differ: {'; '.join(not_comparable)}.")
    if study.study.get("against") and (alone := [titles[name] for name, key in keys.items() if not key]):
        said.append(f"The paper has no setting with the network and the images of: {'; '.join(alone)}.")
    return said


def _differing(study: StudyRecord, setting: str) -> list[str]:
    rows = [row(study, setting, regime, "test_accuracy") for regime in study.study["regimes"]]
    return list(dict.fromkeys(what for found in rows for what in found.differing))

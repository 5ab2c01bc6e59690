"""The paper's own numbers, and when ours may be compared with them."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.settings.config import (
    NIN,
    VGG,
    Adversarial,
    Augmentation,
    Decay,
    DenseNet,
    Setting,
    Spectral,
    Vanilla,
)
from spectreg_lab.statistics.frames import select
from spectreg_lab.storage.store import StudyRecord

MODELS: dict[str, Setting] = {
    "vgg": VGG.model_validate({}),
    "nin": NIN.model_validate({}),
    "densenet40": DenseNet.model_validate({"depth": 40}),
    "densenet22": DenseNet.model_validate({"depth": 22}),
}
METHODS: dict[str, Setting] = {
    "vanilla": Vanilla(),
    "decay": Decay(strength=1e-4),
    "adversarial": Adversarial(epsilon=1.0, alpha=0.5),
    "spectral": Spectral(strength=0.01),
}
BATCH_SIZES = {"small": 64, "large": 4096}  # the paper's two regimes
RATES = {"vgg": (0.01, 0.1), "nin": (0.1, 1.0), "densenet40": (0.1, 1.0), "densenet22": (0.01, 0.1)}  # in either
EPOCHS = 200  # not in the paper: see studies/paper.toml
AUGMENTATIONS = {"stl10": Augmentation(pad=12, flip=True).model_dump(mode="json")}
SOURCE = "Table 1 of arXiv:1705.10941"


@dataclass(frozen=True)
class PaperRow:
    """The paper's values by method, and in what our runs of that row are not the paper's."""

    values: dict[str, float]
    differing: tuple[str, ...] = ()


@cache
def table1() -> pd.DataFrame:
    """Table 1 of arXiv:1705.10941 as printed: a row for each model, data set, batch size and metric."""
    with (files("spectreg_lab") / "table1.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def row(study: StudyRecord, setting: str, regime: str, metric: str) -> PaperRow:
    """The paper's values to set beside one of ours: those of its regime of that batch size, else of that name.

    There are none where none are asked for, or the regime has neither.
    """
    described = study.study["settings"][setting]
    model, _, dataset = (described.get("paper") or "").partition("/")
    batch_size = labels.batch_size(study, regime, setting)
    if batch_size not in BATCH_SIZES.values():
        batch_size = BATCH_SIZES.get(regime)
    rows = select(table1(), model=model, dataset=dataset, batch_size=batch_size, metric=metric)
    if rows.empty or batch_size is None:
        return PaperRow({})
    values = {method: float(rows[method].iloc[0]) for method in study.study["methods"] if method in rows}
    differing = [
        difference
        for run in study.runs
        if (run.setting, run.regime) == (setting, regime) and run.method in values and run.config
        for difference in differences(run.config, model, dataset, batch_size, run.method)
    ]
    threshold = (described.get("alpha") or {}).get(regime)
    if metric == "generalization_gap" and threshold != float(rows.threshold.iloc[0]):
        differing.append("α")
    return PaperRow(values, tuple(dict.fromkeys(differing)))


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
    return next((f"{m}/{d}" for m, d in rows if config and all(_network_and_images(config, m, d).values())), None)


def differences(config: dict[str, Any], model: str, dataset: str, batch_size: int, method: str) -> tuple[str, ...]:
    """In what a run's setting is not the paper's; its numbers are comparable only where this is empty."""
    rate = RATES[model][list(BATCH_SIZES.values()).index(batch_size)]
    same = _network_and_images(config, model, dataset) | {
        "augmentation": config["data"].get("augmentation") == AUGMENTATIONS.get(dataset),
        "batch size": config["batch_size"] == batch_size,
        "learning rate": config["learning_rate"] == rate,
        "epochs": config["epochs"] == EPOCHS,
        "strength": config["method"] == METHODS[method].model_dump(mode="json"),
    }
    return tuple(name for name, alike in same.items() if not alike)


def _network_and_images(config: dict[str, Any], model: str, dataset: str) -> dict[str, bool]:
    data = config["data"]
    return {
        "data": data["name"].rsplit("/", 1)[-1] == dataset,
        "number of images": not any(data.get(key) for key in ("train_size", "test_size", "validation", "classes")),
        "image size": not data.get("shrink"),
        "network": config["model"] == MODELS[model].model_dump(mode="json"),
    }


def notes(study: StudyRecord) -> list[str]:
    """Sentences that say whose values stand beside ours, which are not comparable and why, and what has none."""
    keys = {name: described.get("paper") for name, described in study.study["settings"].items()}
    titles = {name: labels.setting(study, name) for name in keys}
    differing = {name: _differing(study, name) for name, key in keys.items() if key}
    said = [f"“paper”: {SOURCE}."] if differing else []
    if not_comparable := [f"{titles[name]} ({', '.join(reasons)})" for name, reasons in differing.items() if reasons]:
        said.append(f"† Not comparable with ours, because these differ: {'; '.join(not_comparable)}.")
    if study.study.get("against") and (alone := [titles[name] for name, key in keys.items() if not key]):
        said.append(f"The paper has no setting with the network and the images of: {'; '.join(alone)}.")
    return said


def _differing(study: StudyRecord, setting: str) -> list[str]:
    metrics = ("test_accuracy", "generalization_gap")
    rows = [row(study, setting, regime, metric) for regime in study.study["regimes"] for metric in metrics]
    return list(dict.fromkeys(what for published in rows for what in published.differing))

"""How things are called and coloured: the same in every exhibit."""

from typing import Any

from spectreg_lab.storage.store import StudyRecord

# Okabe & Ito's colours, told apart by colour-blind readers, those of them that stand out on white and on black alike.
COLOURS = {"vanilla": "#808080", "decay": "#0c7fc4", "adversarial": "#d55e00", "spectral": "#009e73"}
OTHERS = ("#b85c97", "#9a7d0a", "#3a9fd6", "#8d6cd1", "#c23b4e", "#5f8f2f")
DASHES = ("solid", "dashed", "dotted")

STAND_INS = {
    "cifar10-jpeg": "JPEG CIFAR-10",
    "tinyimagenet100-32px": "Tiny ImageNet, 100 classes at 32 px",
    "tinyimagenet10-64px": "Tiny ImageNet, 10 classes at 64 px",
}


def colours(study: StudyRecord) -> dict[str, str]:
    """A colour for each method of the study, whether or not any run of it exists."""
    others = [method for method in study.study["methods"] if method not in COLOURS]
    return COLOURS | {method: OTHERS[i % len(OTHERS)] for i, method in enumerate(others)}


def stand_in(name: str) -> str | None:
    """The label of a data set that stands in for a published one, None for any other."""
    return next((label for ending, label in STAND_INS.items() if name.rstrip("/").endswith(ending)), None)


def data(study: StudyRecord, setting: str) -> str:
    """What the images of a setting are."""
    name = (study.study["settings"][setting].get("data") or {}).get("name", "digits")
    return stand_in(name) or name.rstrip("/").rsplit("/", 1)[-1]


def setting(study: StudyRecord, name: str) -> str:
    """The title of a setting: its own, else its name and data."""
    return study.study["settings"][name].get("title") or f"{name} on {data(study, name)}"


def batch_size(study: StudyRecord, regime: str, setting: str) -> int | None:
    """The batch size of a regime in a setting, None where none was recorded."""
    own: dict[str, int] = study.study["settings"][setting].get("batch_size") or {}
    size: Any = own.get(regime, study.study["regimes"][regime].get("batch_size"))
    return size


def batch(study: StudyRecord, regime: str, setting: str | None = None) -> str:
    """The regime with its batch size in a setting, or in all of them where it is the same."""
    sizes = {batch_size(study, regime, name) for name in ([setting] if setting else study.study["settings"])}
    return f"{regime} batch" if None in sizes or len(sizes) != 1 else f"{regime} batch, B = {sizes.pop()}"


def dash(study: StudyRecord, regime: str) -> str:
    """The first regime is drawn solid, the second dashed, as in the paper."""
    return DASHES[min(list(study.study["regimes"]).index(regime), len(DASHES) - 1)]


def dashes(study: StudyRecord) -> dict[str, str]:
    """Legend of `dash`."""
    return {dash(study, regime): batch(study, regime) for regime in study.study["regimes"]}

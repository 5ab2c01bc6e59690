"""Where the numbers come from: command, versions, machine, seeds and data."""

from typing import Any

from spectreg_lab.exhibits import labels
from spectreg_lab.storage.store import RunRecord, StudyRecord

VARYING = ("started", "seconds", "command")  # differ between runs that are otherwise alike


def versions(study: StudyRecord) -> dict[str, list[str]]:
    """Each recorded version, with every value that the study's runs have of it, the commonest first."""
    counted: dict[str, dict[str, int]] = {}
    for run in study.runs:
        for name, value in run.versions.items():
            counts = counted.setdefault(name, {})
            counts[str(value)] = counts.get(str(value), 0) + 1
    return {name: sorted(counts, key=lambda value: -counts[value]) for name, counts in counted.items()}


def differing(study: StudyRecord) -> list[str]:
    """Names of the versions that are not the same in all runs."""
    return [name for name, values in versions(study).items() if len(values) > 1 and name not in VARYING]


def _taken_with(run: RunRecord) -> dict[str, str]:
    """What a run was measured with; runs of earlier versions tell the number of test images only, by their norms."""
    norms = (run.measures.get("jacobian") or {}).get("norms")
    taken = ({"test_images": len(norms)} if norms else {}) | (run.measures.get("taken_with") or {})
    return {name.replace("_", " "): str(value) for name, value in taken.items()}


def unlike_measures(study: StudyRecord) -> list[str]:
    """Each setting with what its runs were measured with, where that is not the same in all that tell it."""
    values: dict[str, dict[str, list[str]]] = {}
    for run in study.runs:
        for name, value in _taken_with(run).items() if run.status == "finished" else ():
            known = values.setdefault(run.setting, {}).setdefault(name, [])
            known += [] if value in known else [value]
    unlike = {
        setting: ", ".join(f"{name} {' or '.join(known)}" for name, known in names.items() if len(known) > 1)
        for setting, names in values.items()
    }
    return [f"{setting}: {said}" for setting, said in unlike.items() if said]


def _data(study: StudyRecord, setting: str) -> str:
    data = study.study["settings"][setting].get("data") or {}
    sizes = {"training": data.get("train_size"), "test": data.get("test_size")}
    kept = [f"{data['classes']} of the classes"] if data.get("classes") else []
    if data.get("shrink"):
        kept.append(f"{data['shrink']} times smaller")
    counts = [f"{size} {side} images" for side, size in sizes.items() if size]
    return ", ".join([labels.data(study, setting), *kept, *counts])


def _by_regime(values: dict[str, Any]) -> str:
    return ", ".join(f"{value} ({regime} batch)" for regime, value in values.items())


def _settings(study: StudyRecord) -> list[tuple[str, str]]:
    """What the paper leaves open or a search chose: epochs, learning rates, strengths, and the rule for α."""
    described = study.study
    cases, methods = described["settings"], described["methods"]
    epochs = {name: case.get("epochs") or described["epochs"] for name, case in cases.items()}
    rates = {name: _by_regime(case.get("learning_rate") or {}) for name, case in cases.items()}
    strengths = {
        name: ", ".join(f"{field} {value}" for field, value in method.items() if field != "name")
        for name, method in methods.items()
    }
    alphas = {name: _by_regime(case.get("alpha") or {}) for name, case in cases.items()}
    rule = "the largest multiple of 0.01 that every finished run of a row of Table 1 exceeds"
    return [
        ("epochs", "; ".join(f"{name}: {count}" for name, count in epochs.items())),
        ("learning rates", "; ".join(f"{name}: {rate or 'not recorded'}" for name, rate in rates.items())),
        ("methods", "; ".join(f"{name}: {fields}" if fields else name for name, fields in strengths.items())),
        (
            "α of the gap",
            "; ".join(f"{name}: {own or rule}" for name, own in alphas.items()) if any(alphas.values()) else rule,
        ),
    ]


def foot(study: StudyRecord) -> list[tuple[str, str]]:
    """Name and value of everything that a reader needs to run the study again."""
    described = study.study
    facts = [
        ("study", described["name"]),
        ("command", described.get("command") or "not recorded"),
        ("seeds", ", ".join(str(seed) for seed in sorted({run.seed for run in study.runs})) or "none"),
        ("data", "; ".join(f"{name}: {_data(study, name)}" for name in described["settings"])),
        *_settings(study),
    ]
    for name, values in versions(study).items():
        if name == "started":
            facts.append(("first run started", min(values)))
        elif name == "command":
            facts += [("commands of the runs", "; ".join(values))] if values != [described.get("command")] else []
        elif name != "seconds":
            facts.append((name, "; ".join(values)))
    return facts


def warnings(study: StudyRecord) -> list[str]:
    """What a reader must know before comparing these numbers with others."""
    names = [(described.get("data") or {}).get("name", "") for described in study.study["settings"].values()]
    stand_ins = list(dict.fromkeys(label for name in names if (label := labels.stand_in(name))))
    said = []
    if stand_ins:
        said.append(
            f"The images are {'; '.join(stand_ins)}: stand-ins for the paper's data. Accuracies on them do not compare "
            "with published ones on the real sets."
        )
    if differing(study):
        said.append(f"The runs differ in: {', '.join(differing(study))}. The foot of the page lists the values.")
    if unlike := unlike_measures(study):
        said.append(
            f"Some runs were measured with other settings than others ({'; '.join(unlike)}), so their measures do not "
            "compare: delete measures.json of these runs and give `spectreg measure` for all of them alike."
        )
    return said

"""The choice of hyperparameters: a grid over learning rate and strength, judged on held-out training images.

The criterion, the same for every method:

1. For each setting and regime, the learning rate at which the four methods, each at its best strength, have the highest
   mean validation accuracy; only rates count at which every method fits the training images (accuracy over ``FIT`` in
   the mean over seeds) at some strength, unless there is none.
2. For each method one strength for all settings and regimes: the highest mean validation accuracy at the chosen rates
   among the strengths that fit the training images in all of them, unless there is none.
"""

from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pandas as pd

from spectreg_lab.settings.faults import line
from spectreg_lab.settings.studies import Study, StudyError
from spectreg_lab.storage.claims import holder
from spectreg_lab.storage.files import csv, write
from spectreg_lab.storage.store import SEARCH, RunRecord, read_study

FIT = 0.95
CELL = ["setting", "regime"]
METHOD = ["setting", "method"]
KEYS = [*CELL, "method", "learning_rate", "strength"]
NUMBERS = ["learning_rate", "strength", "training", "validation"]


@dataclass(frozen=True)
class Choice:
    """What a search found: every combination tried, ``chosen`` or not; a learning rate a cell, a strength a method."""

    tried: pd.DataFrame
    rates: pd.DataFrame
    strengths: pd.DataFrame


def check(study: Study) -> None:
    """Refuse a study that searches nothing.

    Raises:
        StudyError: it has no [search] table: its runs would be judged on test images.
    """
    if study.search is None:
        raise StudyError(
            f"the study {study.name!r} has no [search] table, so there is nothing to choose: add one, or do its runs "
            "with `spectreg reproduce`"
        )


def choose(folder: Path) -> Choice:
    """Judge the runs of a search's folder, and write the table of all of them there; one that failed learned nothing.

    Raises:
        StudyError: some of them have not ended, or none has finished.
    """
    choice = judge(_tried(folder))
    keep(choice.tried, folder)
    return choice


def judge(tried: pd.DataFrame) -> Choice:
    """What the criterion chooses of the combinations in ``tried``."""
    rates = _best_rates(tried)
    at_rates = tried.merge(rates[[*CELL, "learning_rate"]], on=[*CELL, "learning_rate"])
    strengths = _best_strengths(at_rates)
    chosen = at_rates.merge(strengths[["method", "strength"]], on=["method", "strength"]).assign(chosen=True)
    tried = tried.merge(chosen[[*KEYS, "chosen"]], on=KEYS, how="left").fillna({"chosen": False})
    return Choice(tried, rates, strengths)


def own_strengths(tried: pd.DataFrame) -> pd.DataFrame:
    """For each setting and method the strength that is best for that network alone, at the rates chosen for all.

    By the same criterion: the highest mean validation accuracy over regimes among the strengths that fit there.
    """
    at_rates = tried.merge(_best_rates(tried)[[*CELL, "learning_rate"]], on=[*CELL, "learning_rate"])
    by_strength = at_rates.groupby([*METHOD, "strength"], as_index=False, sort=False).agg(
        validation=("validation", "mean"), training=("training", "min"), shared=("chosen", "any")
    )
    shared = by_strength[by_strength["shared"]][[*METHOD, "strength", "validation"]]
    own = _best(by_strength.drop(columns="shared"), METHOD)
    return own.merge(shared, on=METHOD, how="left", suffixes=("", "_shared"))


def gather(tables: list[Path]) -> pd.DataFrame | None:
    """The tables of the searches that chose a study's settings, as one; None where there was no search.

    Raises:
        StudyError: one of them is no such table, or two are of one setting: each chooses for all that it has of one.
    """
    found = [read(path, path) for path in tables]
    owner: dict[str, Path] = {}
    for path, table in zip(tables, found, strict=True):
        for setting in table["setting"].unique():
            if setting in owner:
                raise StudyError(
                    f"searched: {owner[setting]} and {path} both have the setting {setting!r}, and only one search can "
                    "choose for it: leave one of them out"
                )
            owner[setting] = path
    return pd.concat(found) if found else None


def keep(table: pd.DataFrame | None, folder: Path) -> None:
    """Put the table of a study's searches into the study's folder."""
    if table is not None:
        write(folder / SEARCH, csv(table))


def read(source: Path | StringIO, path: Path) -> pd.DataFrame:
    """Every combination that a search tried, as it left them; ``path`` is where an error says that the table lies.

    Raises:
        StudyError: ``source`` is no such table.
    """
    try:
        table = pd.read_csv(source, dtype=dict.fromkeys((*CELL, "method"), str), keep_default_na=False)
        if missing := sorted({*KEYS, *NUMBERS, "chosen"} - set(table)):
            raise ValueError(f"it has no column {', '.join(missing)}")
        for name in NUMBERS:
            table[name] = pd.to_numeric(table[name])
        if not table["chosen"].isin([True, False]).all():
            raise ValueError("its column chosen is not True or False")
        _check_is_one_search(table)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, ValueError, OverflowError) as error:
        cause = line(str(error))
        raise StudyError(f"{path} is not the table of a search: {cause}; `spectreg search` writes it anew") from None
    return table


def _check_is_one_search(table: pd.DataFrame) -> None:
    strengths = table[table["chosen"].astype(bool)].drop_duplicates([*METHOD, "strength"])
    for rows, keys, what in ((table, KEYS, "combination"), (strengths, METHOD, "chosen strength")):
        if (twice := rows[rows.duplicated(keys)]).size:
            place = " ".join(twice.iloc[0][name] for name in (*CELL, "method"))
            raise ValueError(f"it has more than one {what} of {place}, as of two searches")


def _tried(folder: Path) -> pd.DataFrame:
    rows, runs = [], read_study(folder).runs
    if left := [run for run in runs if not _over(run)]:
        cause = next((f"; of one is recorded: {run.error}" for run in left if run.error), "")
        raise StudyError(
            f"{folder}: {len(left)} of {len(runs)} runs are still at work or not begun, so nothing is chosen yet: give "
            f"the same command when they are done{cause}"
        )
    if not any(run.status == "finished" for run in runs):
        cause = next((f"; the first failed with {run.error}" for run in runs if run.error), "")
        raise StudyError(f"{folder}: no run of this search has finished, so there is nothing to choose from{cause}")
    for run in runs:
        method = run.config.get("method", {})
        last = run.metrics[-1] if run.metrics and run.status == "finished" else {}
        rows.append(
            {
                "setting": run.setting,
                "regime": run.regime,
                "method": run.method,
                "learning_rate": run.config["learning_rate"],
                "strength": method.get("epsilon", method.get("strength", 0.0)),
                "training": last.get("train_accuracy", 0.0),
                "validation": last.get("test_accuracy", 0.0),
            }
        )
    frame = pd.DataFrame(rows)
    return frame.groupby(KEYS, as_index=False, sort=False).agg(
        n=("training", "size"), training=("training", "mean"), validation=("validation", "mean")
    )


def _over(run: RunRecord) -> bool:
    """Whether a run has come to its end, and no process is trying it once more."""
    return run.status == "finished" or (run.status == "failed" and bool(run.config) and holder(run.folder) is None)


def _best_rates(tried: pd.DataFrame) -> pd.DataFrame:
    by_method = tried.sort_values("validation").groupby([*CELL, "learning_rate", "method"], as_index=False).last()
    fitting = tried.groupby([*CELL, "learning_rate", "method"], as_index=False)["training"].max()
    by_rate = by_method.groupby([*CELL, "learning_rate"], as_index=False)["validation"].mean()
    least = fitting.groupby([*CELL, "learning_rate"], as_index=False)["training"].min()
    return _best(by_rate.merge(least, on=[*CELL, "learning_rate"]), CELL)


def _best_strengths(at_rates: pd.DataFrame) -> pd.DataFrame:
    keys = ["method", "strength"]
    return _best(
        at_rates.groupby(keys, as_index=False).agg(validation=("validation", "mean"), training=("training", "min")),
        ["method"],
    )


def _best(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """For each ``by`` the row of the highest validation accuracy, among those that fit where any does."""
    ordered = frame.assign(fits=frame["training"] > FIT).sort_values(["fits", "validation"])
    return ordered.groupby(by, as_index=False).last()

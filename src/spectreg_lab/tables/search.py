"""How the learning rates and strengths of a study were chosen: the table of its search."""

from io import StringIO

import pandas as pd

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Table
from spectreg_lab.statistics.frames import records, select
from spectreg_lab.storage.store import SEARCH, StudyRecord
from spectreg_lab.studies import search

COLUMNS = ["setting", "regime", "method", "learning_rate", "strength", "n", "training", "validation", "chosen"]


def values(study: StudyRecord) -> pd.DataFrame:
    """Every combination that the search tried, as `studies.search` wrote it; empty where there was no search."""
    if study.search is None:
        return pd.DataFrame(columns=COLUMNS)
    return search.read(StringIO(study.search), study.folder / SEARCH)


def _cell(rows: pd.DataFrame) -> Cell:
    if rows.empty:
        return Cell("–", tone="muted")
    (tried,) = records(rows)
    return Cell(f"{tried['validation']:.3f}", [f"training {tried['training']:.3f}"], bold=bool(tried["chosen"]))


def _table(study: StudyRecord, tried: pd.DataFrame, setting: str, regime: str) -> Table:
    trials = select(tried, setting=setting, regime=regime)
    rates = sorted(trials.learning_rate.unique())
    rows = [
        [
            Cell(f"{method} {strength:g}" if strength else str(method)),
            *(_cell(select(group, learning_rate=r)) for r in rates),
        ]
        for (method, strength), group in trials.groupby(["method", "strength"], sort=False)
    ]
    title = labels.setting(study, setting) if setting in study.study["settings"] else setting
    return Table(["method, strength", *(f"rate {rate:g}" for rate in rates)], rows, f"{title}, {regime} batch")


def _own_table(study: StudyRecord, tried: pd.DataFrame) -> Table:
    own = search.own_strengths(tried)
    methods = [name for name in dict.fromkeys(own.method) if (select(own, method=name).strength > 0).any()]
    rows = []
    for setting in dict.fromkeys(own.setting):
        title = labels.setting(study, setting) if setting in study.study["settings"] else setting
        rows.append([Cell(title), *(_own_cell(select(own, setting=setting, method=name)) for name in methods)])
    return Table(["network", *methods], rows, "Each network's own best strength, and the one chosen for all")


def _own_cell(rows: pd.DataFrame) -> Cell:
    if rows.empty:
        return Cell("–", tone="muted")
    (row,) = records(rows)
    shared = f"{row['strength_shared']:g}: {row['validation_shared']:.3f}"
    return Cell(f"{row['strength']:g}: {row['validation']:.3f}", [f"for all, {shared}"])


def departures(study: StudyRecord, tried: pd.DataFrame) -> list[str]:
    """Where the study's rates and strengths are not those that the search chose."""
    departing = []
    for row in records(tried[tried.chosen.astype(bool)]):
        method = study.study["methods"].get(row["method"], {})
        rates = study.study["settings"].get(row["setting"], {}).get("learning_rate") or {}
        strength, rate = method.get("epsilon", method.get("strength")), rates.get(row["regime"])
        if strength not in (None, row["strength"]):
            departing.append(f"{row['method']} {strength:g} (chosen: {row['strength']:g})")
        if rate not in (None, row["learning_rate"]):
            place = f"rate of {row['setting']}, {row['regime']} batch"
            departing.append(f"{place}, {rate:g} (chosen: {row['learning_rate']:g})")
    return list(dict.fromkeys(departing))


def exhibit(study: StudyRecord, tried: pd.DataFrame) -> Exhibit:
    """One table for each setting and regime searched: validation accuracy by strength and learning rate."""
    departing = departures(study, tried)
    cells = [] if tried.empty else tried[["setting", "regime"]].drop_duplicates().itertuples(index=False)
    return Exhibit(
        name="search",
        title="How learning rates and strengths were chosen",
        claim="Section 4: by a grid search, one choice that does reasonably well for every network and batch size.",
        frame=tried,
        tables=[
            *([] if tried.empty else [_own_table(study, tried)]),
            *(_table(study, tried, setting, regime) for setting, regime in cells),
        ],
        notes=[
            "Accuracy on training images held out for it, never on test images; bold: chosen. Of each setting and "
            "regime the learning rate with the best mean over methods, each at its best strength; of each method one "
            "strength for all settings and regimes. Those at which the network fits its training images (over 0.95) "
            "go first. A network's own strength is the best for it alone, by the same criterion at the same "
            "rates: mean validation accuracy over regimes.",
            *(
                [f"The study departs from the search in: {'; '.join(departing)}. Its file says why."]
                if departing
                else []
            ),
        ],
        missing="" if len(tried) else "the study names no search: `searched` in its file says where the table lies",
    )

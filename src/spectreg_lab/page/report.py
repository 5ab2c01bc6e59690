"""A study folder as one page that opens from disk, with every exhibit as CSV, SVG and Markdown beside it."""

import re
from importlib.resources import files
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from spectreg_lab.exhibits import labels
from spectreg_lab.exhibits.exhibit import Cell, Exhibit, Panel, Table
from spectreg_lab.figures.svg import draw, sheet
from spectreg_lab.page import provenance
from spectreg_lab.page.exhibits import exhibits
from spectreg_lab.statistics import paper, verdicts
from spectreg_lab.storage import archive, records, store
from spectreg_lab.storage.errors import RunError
from spectreg_lab.storage.files import csv
from spectreg_lab.storage.files import write as write_file

PAGE = "report.html"


def write(source: Path, against_paper: bool = False, out: Path | None = None) -> Path:
    """Write the page of a study and the files of every exhibit; works at any moment of a study.

    Args:
        source: A study folder, or a file that `spectreg export` made of one.
        against_paper: Set the paper's numbers beside ours in every setting that is one of the paper's, whether or not
            the study asks for them.

        out: Folder for the page and its files; by default ``report`` in the study folder, or beside the file.

    Returns:
        The page's path.

    Raises:
        RunError: ``source`` is no study, or one of another format version, or ``out`` is a study folder.
    """
    study = archive.read(source)
    report = out or study.folder / store.REPORT
    if (report / store.STUDY).exists():
        raise RunError(f"{report} is a study folder, whose own files a page would replace: give it another with --out")
    if fault := records.fault(records.WholeStudy, study.study):
        raise RunError(f"the record of the study in {source} {fault}: {store.REWRITTEN}")
    for run in study.runs:
        for kind, name in (("setting", run.setting), ("regime", run.regime), ("method", run.method)):
            if name not in study.study[f"{kind}s"]:
                raise RunError(f"{source} has a run of the {kind} {name!r}, which its study has not: {store.REWRITTEN}")
    if study.study.get("search"):
        raise RunError(
            f"{source} holds a search, whose runs have many learning rates and strengths: what it chose is in "
            f"{store.SEARCH} of its folder, and in the report of a study that names that as searched"
        )
    if against_paper:
        study = paper.beside(study)
    shown = exhibits(study)
    report.mkdir(parents=True, exist_ok=True)
    if (report / PAGE).exists():
        _clear(report, shown)
    colours = labels.colours(study)
    drawings = {exhibit.name: _drawings(exhibit, colours) for exhibit in shown}
    for exhibit in shown:
        _write_files(report, exhibit, drawings[exhibit.name], colours)
    write_file(report / PAGE, page(study, shown, drawings).encode())
    return report / PAGE


def svg_name(exhibit: Exhibit, group: str) -> str:
    """File name of the drawing of one group of an exhibit's panels."""
    return f"{exhibit.name}-{group}.svg"


Drawings = dict[str, list[tuple[Panel, str]]]


def _drawings(exhibit: Exhibit, colours: dict[str, str]) -> Drawings:
    """Every panel of an exhibit with its SVG, by group."""
    groups: Drawings = {}
    for i, panel in enumerate(exhibit.panels):
        groups.setdefault(panel.group, []).append((panel, draw(panel, colours, f"{exhibit.name}-{i}")))
    return groups


def _clear(report: Path, shown: list[Exhibit]) -> None:
    """Delete the tables of an earlier report that this one has not, such as that of runs that were missing."""
    for exhibit in shown:
        if not _tables(exhibit):
            (report / f"{exhibit.name}.md").unlink(missing_ok=True)


def _write_files(report: Path, exhibit: Exhibit, drawings: Drawings, colours: dict[str, str]) -> None:
    write_file(report / f"{exhibit.name}.csv", csv(exhibit.frame))
    if shown := _tables(exhibit):
        text = "\n\n".join(markdown(table) for table in shown)
        write_file(report / f"{exhibit.name}.md", f"{text}\n".encode())
    for group, drawn in drawings.items():
        methods = dict.fromkeys(line.method for panel, _ in drawn for line in panel.lines)
        drawing = sheet([svg for _, svg in drawn], {method: colours[method] for method in methods}, exhibit.dashes)
        write_file(report / svg_name(exhibit, group), drawing.encode())


def _tables(exhibit: Exhibit) -> list[Table]:
    """What the Markdown file of an exhibit has."""
    return [*_verdicts(exhibit), *exhibit.tables]


def _verdicts(exhibit: Exhibit) -> list[Table]:
    """Every claim with its outcome as one table, for the Markdown file."""
    rows = [[Cell(v.section), Cell(v.sentence), Cell(v.outcome, bold=True), Cell(v.line)] for v in exhibit.verdicts]
    return [Table(["section", "claim", "here", "what decides"], rows)] if rows else []


def markdown(table: Table) -> str:
    """A table as Markdown, without its small print.

    >>> from spectreg_lab.exhibits.exhibit import Cell
    >>> row = [Cell("VGG", ["B = 64"]), Cell("0.904", ["paper 0.904"], bold=True)]
    >>> print(markdown(Table(["setting", "spectral"], [row])))
    | setting | spectral |
    |---|---|
    | VGG, B = 64 | **0.904** |
    """
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for head, *cells in table.rows:
        texts = [", ".join([head.text, *head.small]), *(f"**{c.text}**" if c.bold else c.text for c in cells)]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    return "\n".join([f"{table.caption}\n", *lines] if table.caption else lines)


def _code(text: str) -> Markup:
    """Text as HTML, with `backticks` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def page(study: store.StudyRecord, shown: list[Exhibit], drawings: dict[str, Drawings]) -> str:
    """The page as HTML: nothing in it needs the network."""
    folder = files("spectreg_lab") / "page"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = _code
    template = environment.from_string((folder / "report.html.jinja").read_text("utf-8"))
    colours = labels.colours(study)
    return template.render(
        study=study.study,
        exhibits=shown,
        drawings=drawings,
        svg_name=svg_name,
        titles={name: labels.setting(study, name) for name in study.study["settings"]},
        methods={method: colours[method] for method in study.study["methods"]},
        colours=colours,
        warnings=[*provenance.warnings(study), *(warning for exhibit in shown for warning in exhibit.warnings)],
        tones=verdicts.TONES,
        foot=provenance.foot(study),
        written=pd.Timestamp.now("UTC").strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup((folder / "report.css").read_text("utf-8")),
        script=Markup((folder / "report.js").read_text("utf-8")),
    )

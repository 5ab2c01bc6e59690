"""A study folder as one page that opens from disk, with the CSV and the SVG of every exhibit beside it."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from spectreg_lab import store
from spectreg_lab.exhibits import Exhibit, exhibits, labels, provenance, verdicts
from spectreg_lab.exhibits.exhibit import Panel
from spectreg_lab.exhibits.interactive import traces
from spectreg_lab.exhibits.svg import svg

PAGE = "report.html"


def write(folder: Path) -> Path:
    """Write ``folder/report/report.html`` and the files of every exhibit; works at any moment of a study.

    Returns:
        The page's path.

    Raises:
        RunError: ``folder`` is not a study folder, or one of another format version.
    """
    study = store.read_study(folder)
    shown = exhibits(study)
    report = folder / store.REPORT
    report.mkdir(exist_ok=True)
    for exhibit in shown:
        _write_files(report, exhibit, labels.colours(study))
    store.write(report / PAGE, page(study, shown).encode())
    return report / PAGE


def svg_name(exhibit: Exhibit, group: str) -> str:
    """File name of the drawing of one group of an exhibit's panels."""
    return f"{exhibit.name}-{group}.svg"


def _groups(exhibit: Exhibit) -> dict[str, list[Panel]]:
    groups: dict[str, list[Panel]] = {}
    for panel in exhibit.panels:
        groups.setdefault(panel.group, []).append(panel)
    return groups


def _write_files(report: Path, exhibit: Exhibit, colours: dict[str, str]) -> None:
    store.write(report / f"{exhibit.name}.csv", exhibit.frame.to_csv(index=False).encode())
    for group, panels in _groups(exhibit).items():
        store.write(report / svg_name(exhibit, group), svg(panels, colours, exhibit.dashes).encode())


def _code(text: str) -> Markup:
    """Text as HTML, with `backticks` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _script(text: str) -> Markup:
    return Markup(text.replace("</", "<\\/"))


def page(study: store.StudyRecord, shown: list[Exhibit]) -> str:
    """The page as HTML: nothing in it needs the network."""
    folder = files("spectreg_lab") / "page"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = _code
    template = environment.from_string((folder / "report.html.jinja").read_text())
    colours = labels.colours(study)
    drawn = [traces(panel, colours) for exhibit in shown for panels in _groups(exhibit).values() for panel in panels]
    return template.render(
        study=study.study,
        exhibits=shown,
        groups=_groups,
        svg_name=svg_name,
        titles={name: labels.setting(study, name) for name in study.study["settings"]},
        methods={method: colours[method] for method in study.study["methods"]},
        colours=colours,
        warnings=[*provenance.warnings(study), *(warning for exhibit in shown for warning in exhibit.warnings)],
        tones=verdicts.TONES,
        foot=provenance.foot(study),
        written=pd.Timestamp.now("UTC").strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup((folder / "report.css").read_text()),
        script=Markup((folder / "report.js").read_text()),
        plotly=Markup(get_plotlyjs() if drawn else ""),
        panels=_script(json.dumps(drawn, separators=(",", ":"))),
    )

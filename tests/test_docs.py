"""What the documents point to is there."""

import importlib
import re
import shutil
from pathlib import Path

import pytest

from spectreg_lab.page import report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = set(re.findall(r"def (test_\w+)", "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))))


def named(page: Path, pattern: str) -> list[str]:
    return re.findall(pattern, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    assert not [name for name in named(page, r"`(test_\w+)`") if name not in TESTS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_and_module_that_a_page_names_exists(page):
    for name in named(page, r"`((?:spectreg|spectreg_lab)(?:\.\w+)+)`"):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_picture_that_a_page_links_to_exists(page):
    for target in named(page, r"\]\(([^)#\s]+)(?:#[\w-]*)?\)"):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_study_and_result_that_a_page_names_exists(page):
    for target in named(page, r"(?:studies|results)/[\w./-]*\w"):
        assert (ROOT / target).exists() or "{" in target, target


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("README.md", "results/cpu/report/table1.md"),
        ("docs/paper.md", "results/cpu/report/verdicts.md"),
        ("docs/paper.md", "results/why/report/table1.md"),
        ("docs/paper.md", "results/why/report/fit.md"),
    ],
)
def test_the_results_that_a_page_shows_are_those_in_the_report(page, table):
    assert (ROOT / table).read_text().strip() in (ROOT / page).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("study", ["cpu", "digits"])
def test_the_tables_kept_are_what_the_kept_runs_give(study, tmp_path):
    kept = ROOT / "results" / study
    copy = Path(shutil.copytree(kept, tmp_path / study, ignore=shutil.ignore_patterns("report")))
    report.write(copy)
    for name in ("table1.csv", "table1.md", "verdicts.csv", "verdicts.md", "figure1.csv"):
        assert (copy / "report" / name).read_text() == (kept / "report" / name).read_text(), name


def test_every_row_about_a_peer_names_a_test():
    lines = (ROOT / "docs/peers.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| peer", "| asked for"))]
    assert len(rows) > 35
    assert not [row for row in rows if not re.search(r"`test_\w+`", row)]

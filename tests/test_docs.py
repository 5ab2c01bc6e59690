"""What the documents point to is there."""

import importlib
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pytest

from spectreg_lab.page import report
from spectreg_lab.storage import archive

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"[−+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
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
    for target in named(page, r"(?<!\w/)(?:studies|results)/[\w./-]*\w"):
        assert (ROOT / target).exists() or "{" in target, target


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("docs/paper.md", "results/cpu/report/verdicts.md"),
        ("docs/paper.md", "results/why/report/table1.md"),
        ("docs/paper.md", "results/why/report/fit.md"),
    ],
)
def test_the_results_that_a_page_shows_are_those_in_the_report(page, table):
    assert (ROOT / table).read_text().strip() in (ROOT / page).read_text()


KEPT = [
    pytest.param(path.parent, marks=pytest.mark.portable if path.parent.name == "digits" else (), id=path.parent.name)
    for path in sorted((ROOT / "results").glob("*/runs.jsonl.gz"))
]


@pytest.mark.slow
@pytest.mark.untraced
@pytest.mark.parametrize("kept", KEPT)
def test_the_page_of_a_kept_study_is_written_again_from_its_one_file_with_the_tables_that_are_kept(kept, tmp_path):
    assert report.write(kept / archive.NAME, out=tmp_path).stat().st_size > 100_000
    files = list((kept / "report").iterdir())
    assert len([file for file in files if file.suffix == ".svg"]) in range(1, 13)
    for file in files:
        if file.suffix == ".csv":
            assert_the_same_numbers(tmp_path / file.name, file)
        elif file.suffix == ".md":
            assert_the_same_text((tmp_path / file.name).read_text(), file.read_text())


def test_the_results_kept_are_few_and_small():
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file() and path.name != report.PAGE]
    assert len(files) <= 150
    assert sum(path.stat().st_size for path in files) < 5_000_000


def assert_the_same_numbers(found: Path, kept: Path) -> None:
    """Two CSV files agree: their words exactly, their numbers to the six digits that are written."""
    one, other = pd.read_csv(found), pd.read_csv(kept)
    pd.testing.assert_frame_equal(one, other, check_exact=False, rtol=2e-5, atol=1e-12, obj=found.name)


def assert_the_same_text(found: str, kept: str) -> None:
    """Two texts agree: their words and integers exactly, their other numbers up to one unit of the last place."""
    assert NUMBER.sub("#", found) == NUMBER.sub("#", kept)
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(kept), strict=True):
        a, b = Decimal(one.replace("−", "-")), Decimal(other.replace("−", "-"))
        place = Decimal(10) ** max(int(a.as_tuple().exponent), int(b.as_tuple().exponent))
        assert a == b if place == 1 else abs(a - b) <= place, f"{one} is not {other}"


def test_kept_tables_are_compared_by_words_and_by_the_digits_that_are_written(tmp_path):
    def file(name: str, text: str) -> Path:
        (tmp_path / name).write_text(f"claim,p\n{text}\n")
        return tmp_path / name

    kept = file("kept.csv", "held,0.031422153213")
    assert_the_same_numbers(file("a.csv", "held,0.0314222"), kept)
    for other in ("held,0.0314233", "open,0.0314222", "held,"):
        with pytest.raises(AssertionError):
            assert_the_same_numbers(file("b.csv", other), kept)

    assert_the_same_text("**held** 3 · −0.123, p = 2e-05", "**held** 3 · −0.124, p = 3e-05")
    for other in ("**held** 4 · −0.124, p = 2e-05", "**open** 3 · −0.123, p = 2e-05", "**held** 3 · −0.125, p = 2e-05"):
        with pytest.raises(AssertionError):
            assert_the_same_text("**held** 3 · −0.123, p = 2e-05", other)


@pytest.mark.slow
def test_the_tutorials_code_runs_as_it_stands_and_shows_what_the_page_says(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S)
    # Alone, as a reader runs it: 14,000 steps take several times as long where annotations and coverage are looked at.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    environment |= {"MPLBACKEND": "svg", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", "\n".join(blocks)]
    shown = subprocess.run(words, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "<svg" in (tmp_path / "tutorial-spectra.svg").read_text()
    gaps = [float(gap) for gap in re.findall(r"gap (\S+)", shown)]
    gradients = [float(gradient) for gradient in re.findall(r"gradient +(\S+)", shown)]
    assert gaps == sorted(gaps, reverse=True)
    assert gradients[1] < gradients[0] / 2


def test_every_row_about_a_peer_names_a_test():
    lines = (ROOT / "docs/peers.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| peer", "| asked for"))]
    assert len(rows) > 35
    assert not [row for row in rows if not re.search(r"`test_\w+`", row)]

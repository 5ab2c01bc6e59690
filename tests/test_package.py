"""The package as a user installs it: a wheel in an environment of its own, without the lab's extras."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import spectreg

ROOT = Path(__file__).parents[1]
FOUR_LINES = """
import torch
from torch import nn
from spectreg import SpectralNormRegularizer
model = nn.Linear(3, 3, bias=False)
nn.init.eye_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
regularizer = SpectralNormRegularizer(model, strength=0.01)
model(torch.ones(1, 3)).sum().backward()
regularizer.add_gradient()
optimizer.step()
print(regularizer.sigma()["weight"].item())
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd="/", check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_version_stands_in_one_place_and_the_citation_has_it():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == spectreg.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_wheel_and_source_hold_both_packages_with_what_they_read_and_no_results_but_the_tables_of_searches(built):
    (wheel,) = built.glob("*.whl")
    (source,) = built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    needed = ["spectreg/py.typed", "spectreg_lab/py.typed", "spectreg_lab/page/report.css", "spectreg_lab/table1.csv"]
    assert {*needed} <= {*names}
    assert any(name.endswith("digits.toml") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "results/", "benchmarks/"))]
    with tarfile.open(source) as opened:
        inside = opened.getnames()
    assert any(name.endswith("src/spectreg/regularizer.py") for name in inside)
    assert {name.rpartition("/")[2] for name in inside if "/results/" in name} <= {"search.csv"}


@pytest.mark.slow
def test_a_clean_environment_runs_the_four_lines_and_is_told_what_the_command_needs(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", binaries / "python", "--disable-pip-version-check")
    installed = run(*pip, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wheel)
    assert installed.returncode == 0, installed.stderr
    lines = run(binaries / "python", "-c", FOUR_LINES)
    assert float(lines.stdout) == pytest.approx(1.0), lines.stderr
    command = run(binaries / "spectreg", "reproduce")
    assert command.returncode != 0
    assert "spectreg[lab]" in command.stderr
    assert "Traceback" not in command.stderr
    assert run(binaries / "spectreg", "--version").stdout.split()[-1] == spectreg.__version__
